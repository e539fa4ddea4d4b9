# SPDX-License-Identifier: Apache-2.0
"""Simulated people who vote in a study of the shapes world, through the page's own requests.

    python shapes/raters.py --url http://127.0.0.1:7860 --raters 10 --error 0.2 --seed 0

Each looks at the two pictures as the page sends them, and the exact verifier says which one shows what was asked. Where
it calls both right or both wrong, the right answer is a tie; where the page takes none, a toss of a coin. In a share of
the cases, `--error`, a rater gives a wrong answer.
"""

import argparse
import http.client
import json
import random
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import world
from PIL import Image


def opinion(left: float, right: float, ties: bool, error: float, rng: random.Random) -> str:
    """What a rater answers who sees how well each picture shows what was asked, and errs in a share of the cases."""
    answers = ["left", "right"] + ["tie"] * ties
    right_answers = [answers[0] if left > right else answers[1]] if left != right else answers[2:] or answers
    wrong = [answer for answer in answers if answer not in right_answers] or answers
    return rng.choice(wrong if rng.random() < error else right_answers)


class Rater:
    """One rater: its id and its random numbers. A request is repeated until the server answers."""

    def __init__(self, url: str, name: str, error: float, seed: int):
        self.url, self.name, self.error = url, name, error
        self.rng = random.Random(f"{name}|{seed}")
        components = json.loads(self.fetch("config"))["components"]
        self.component = next(part["id"] for part in components if part["props"].get("elem_id") == "study")

    def fetch(self, path: str, body: dict | None = None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/{path}", data, {"Content-Type": "application/json"})
        for _ in range(1800):  # three minutes: a server that imports much starts again in one
            try:
                with urllib.request.urlopen(request, timeout=30) as answer:
                    return answer.read()
            except urllib.error.HTTPError:  # the server is there, and takes no such request
                raise
            except (OSError, http.client.HTTPException):  # the server is gone, and may come back
                time.sleep(0.1)
        raise SystemExit(f"{self.url} does not answer")

    def ask(self, function: str, **request) -> dict:
        """Calls a function of the page's server."""
        body = {"data": {"rater": self.name, **request}, "component_id": self.component, "fn_name": function}
        return json.loads(self.fetch("gradio_api/component_server/", {**body, "session_hash": self.name}))

    def judge(self, state: dict) -> str:
        pictures = [Image.open(BytesIO(self.fetch(f"picture/{name}"))) for name in state["pictures"]]
        left, right = world.accuracy(pictures, [state["prompt"]] * 2)
        return opinion(left, right, state["ties"], self.error, self.rng)

    def work(self, limit: int | None = None) -> int:
        """Answers until nothing is left, or `limit` answers are given; returns their number."""
        state, answers = self.ask("look"), 0
        while not state["finished"] and answers != limit:
            state = self.answer(state, self.judge(state))
            answers += 1
        return answers

    def answer(self, state: dict, answer: str) -> dict:
        """Answers the question that the page shows in this state; returns what it shows then."""
        shown = {"position": state["position"], "picture": state["pictures"][0]}
        return self.ask("answer", **shown, question=state["questions"][state["asked"]][0], answer=answer, seconds=1.0)


def main():
    parser = argparse.ArgumentParser(description="Simulated raters of a study of the shapes world.")
    parser.add_argument("--url", default="http://127.0.0.1:7860")
    parser.add_argument("--raters", type=int, default=10)
    parser.add_argument("--error", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    raters = [Rater(args.url, f"rater{i}", args.error, args.seed) for i in range(args.raters)]
    with ThreadPoolExecutor(args.raters) as pool:
        counts = list(pool.map(Rater.work, raters))
    print(json.dumps({"raters": args.raters, "answers": sum(counts)}))


if __name__ == "__main__":
    main()
