# SPDX-License-Identifier: Apache-2.0
"""Where --prompts comes from: files, URLs, datasets of which only the captions are read, and sets with a short name."""

import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import datasets
import huggingface_hub
import pytest
from datasets import Dataset, Features, Image, Value

import build_synpic
import evaluate


ROWS = [
    {"caption": ' "a" cat ', "tag": "x"},
    {"caption": "a dog, a bird", "tag": "y"},
    {"caption": '"a" cat', "tag": ""},
]
# With any line ends, byte order marks and separators.
FILES = {
    "p.jsonl": "\n".join(json.dumps(row) + "\r\n" for row in ROWS).encode(),  # with empty lines
    "p.json": ("\ufeff" + json.dumps(ROWS, indent=2)).encode(),
    "p.csv": b'tag,caption\r\nx," ""a"" cat "\r\ny,"a dog, a bird"\r\n,"""a"" cat"\r\n',
    "P.CSV": '\ufefftag;caption\rx;" ""a"" cat "\ry;a dog, a bird\r;"""a"" cat"\r'.encode(),
    "excel.csv": 'tag\tcaption\r\nx\t" ""a"" cat "\r\ny\ta dog, a bird\r\n'.encode("utf-16"),
    "p.tsv": b'caption\ttag\n "a" cat \tx\na dog, a bird\ty\n"a" cat\t\n',
    "excel.tsv": 'caption\ttag\r\n "a" cat \tx\r\na dog, a bird\ty\r\n'.encode("utf-16"),
}
LINES = {"p.txt": b"a cat\na | dog\na cat", "P.TXT": b"\xef\xbb\xbfa cat\r\na | dog\r\n\r\n"}
LINES |= {"mac.txt": b"a cat\ra | dog\r", "notepad.txt": "a cat\r\na | dog\r\n".encode("utf-16")}
LINES |= {"p.json": b'["a cat", "a | dog", "a cat"]', "p.csv": b"caption\na cat\na | dog\n"}
BAD_FILES = {
    "p.jsonl": ('{"caption": "a cat"}\n{"caption": "a\n', "line 2 column"),
    "p.json": ('["a cat", 3]', "row 2: the prompt is empty or no text"),
    "p.csv": ("caption,tag\na cat,x\na dog, a bird,y\n", "row 2 has more fields than the header"),
    "p.tsv": ("Caption\ttag\na cat\tx\n", "no column 'caption'; it has Caption, tag"),
    "p.txt": ("a cat\n \na dog\n", "row 2: the prompt is empty"),
    "caf\xe9.txt": ("caf\xe9", "'utf-8' codec can't decode"),
}


def read(source, column="caption", split="train", max_prompts=None, keep=("tag",)) -> list[tuple]:
    rows, _ = build_synpic.read_prompts(str(source), column, split, max_prompts, keep)
    return [(row["prompt"], *(row[name] for name in keep)) for row in rows]


def error(source, column="caption", split="train") -> str:
    with pytest.raises(SystemExit) as stopped:
        read(source, column, split, keep=())
    assert "\n" not in stopped.value.code
    return stopped.value.code


def test_files(tmp_path):
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
        assert read(tmp_path / name) == [('"a" cat', "x"), ("a dog, a bird", "y")], name
    for name, content in LINES.items():
        (tmp_path / name).write_bytes(content)
        assert read(tmp_path / name, keep=()) == [("a cat",), ("a | dog",)], name
    for name, (text, words) in BAD_FILES.items():
        (tmp_path / name).write_text(text, encoding="latin-1")
        message = error(tmp_path / name)
        assert message.startswith(f"--prompts {tmp_path / name}: ") and words in message, message


def test_rows_have_places_and_repeats_are_said(tmp_path, capsys):
    """Where pictures of the source's rows lie: counted over all rows, and within a value of a column."""
    (tmp_path / "p.csv").write_text("caption,tag\na,x\nb,y\na,x\nc,x\nd,y\n")
    rows, places = build_synpic.read_prompts(str(tmp_path / "p.csv"), "caption", "train", None, ("tag",))
    assert [row["prompt"] for row in rows] == ["a", "b", "c", "d"]
    assert [(place["index"], place["tag"]) for place in places] == [(0, 0), (1, 0), (3, 2), (4, 1)]
    said = f"warning: --prompts {tmp_path / 'p.csv'}: 1 of 5 rows repeat an earlier prompt and are left out\n"
    assert capsys.readouterr().err == said


class Web(BaseHTTPRequestHandler):
    """A web server with FILES."""

    seen = []

    def do_GET(self):
        name = self.path.partition("?")[0].rpartition("/")[2]
        self.seen.append(self.path)
        status = 200 if name in self.pages else 404
        kind, body = self.pages.get(name, ("text/plain", b""))
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


Web.pages = {name: ("text/plain; charset=utf-8", content) for name, content in FILES.items()}
Web.pages |= {"p.txt": ("application/octet-stream", b"a cat\r\na dog\r\n"), "page.txt": ("text/html", b"<html>")}
Web.pages |= {"image.txt": ("image/png", b"\x89PNG\r\n")}


@pytest.fixture
def web(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Web)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_urls(web, monkeypatch):
    for name in FILES:
        assert read(f"{web}/{name}?token=secret") == [('"a" cat', "x"), ("a dog, a bird", "y")]
    assert read(f"{web}/p.txt", max_prompts=1, keep=()) == [("a cat",)]
    for path, words in {
        "gone.txt?token=secret": "404 Not Found",
        "page.txt": "this is a web page",
        "image.txt": "'utf-8' codec can't decode",
        "p.parquet": "must end in .txt, .jsonl, .json, .csv, .tsv",
        "p.tsv?token=secret": "no column 'text'; it has caption, tag",
    }.items():
        message = error(f"{web}/{path}", "text")
        assert message.startswith(f"--prompts {web}/{path.partition('?')[0]}: ") and words in message, message
        assert "secret" not in message
    assert sum("gone" in path for path in Web.seen) == 1  # asking again would not help
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = error(f"{web}/p.txt?token=secret")
    assert "offline mode is enabled" in message and "secret" not in message


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Like Pick-a-Pic: every caption twice, 120 MB of images that nothing decodes. Its name is no pattern."""
    folder = tmp_path_factory.mktemp("pairs") / "run [12]"
    (folder / "data").mkdir(parents=True)
    features = Features({"caption": Value("string"), "jpg_0": Image(), "tag": Value("string")})
    for part in range(2):
        rows = [
            {"caption": f" caption {(600 * part + i) // 2}", "jpg_0": {"bytes": os.urandom(100_000)}, "tag": "x"}
            for i in range(600)
        ]
        file = folder / f"data/validation_unique-{part:05d}-of-00002.parquet"
        Dataset.from_list(rows, features=features).to_parquet(file, batch_size=100)
    return folder


def bytes_read() -> int:
    """By all reads of this process so far."""
    return int(open("/proc/self/io").read().split()[1])


def test_a_folder_s_captions_cost_no_images(pairs):
    size = sum(file.stat().st_size for file in pairs.rglob("*.parquet"))
    read(pairs, split="validation_unique", max_prompts=1)  # imports what reads
    before = bytes_read()
    assert read(pairs, split="validation_unique", max_prompts=500) == [(f"caption {i}", "x") for i in range(500)]
    assert bytes_read() - before < size / 100
    assert len(read(pairs, split="validation_unique")) == 600  # to the end, past rows that are not distinct
    assert len(read(next(pairs.rglob("*.parquet")))) == 300
    assert "no column 'text'; it has caption, jpg_0, tag" in error(pairs, "text", "validation_unique")
    assert "train" in error(pairs, "caption", "train")


def rows_of(name: str) -> list[list]:
    """(prompt, category) and the places of a set with a short name."""
    args = build_synpic.parse_arguments(["--prompts", name, "--max_prompts", "500"])
    category = build_synpic.PROMPT_SETS[name].get("category_column")
    source = (args.prompts, args.prompt_column, args.prompt_split, args.max_prompts)
    rows, places = build_synpic.read_prompts(*source, (category,) if category else ())
    return [[row["prompt"], row.get(category), *place.values()] for row, place in zip(rows, places)]


def test_sets_with_a_short_name_come_from_the_hub_without_images(pairs, online, web, tmp_path, monkeypatch, capsys):
    """Through the real client: the bytes of all answers to its requests for 500 captions."""
    for module, name in ((datasets.config, "HF_HUB_OFFLINE"), (build_synpic, "HF_HUB_OFFLINE")):
        monkeypatch.setattr(module, name, False)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", online.url)
    monkeypatch.setitem(build_synpic.PROMPT_SETS["parti"], "source", f"{web}/parti.tsv")
    files = {f"data/{file.name}": file.read_bytes() for file in sorted(pairs.rglob("*.parquet"))}
    first, size = next(iter(files.values())), sum(map(len, files.values()))
    online.commit("datasets", "liuhuohuo2/pick-a-pic-v2", {**files, "data/train-00000-of-00001.parquet": first})
    known = ("anime", "concept-art", "paintings", "photo")
    styles = {f"benchmark/{style}.json": json.dumps([style, "both"]).encode() for style in known}
    online.commit("datasets", "zhwang/HPDv2", {**styles, "train.json": b"{}"})
    Web.pages["parti.tsv"] = ("text/plain", b'Prompt\tCategory\n"42"\tAbstract\na dog\tAnimals\n')

    assert rows_of("pickapic-val") == [[f"caption {i}", None, 2 * i] for i in range(500)]
    assert rows_of("pickapic-train") == [[f"caption {i}", None, 2 * i] for i in range(300)]
    pairs_paths = [path for path in online.served if "pick-a-pic" in path and "train-" not in path]
    assert sum(online.served[path] for path in pairs_paths) < size / 100
    assert not list((tmp_path / "cache").rglob("*.parquet"))
    # As the benchmark numbers its pictures, anime/00001.jpg: repeats count, over all rows and within a style.
    others = [[style, style, 2 * i, 0] for i, style in enumerate(known) if i]
    assert rows_of("hpsv2") == [["anime", "anime", 0, 0], ["both", "anime", 1, 1], *others]
    assert "--prompts hpsv2: 3 of 8 rows repeat an earlier prompt and are left out" in capsys.readouterr().err
    assert [row[:2] for row in rows_of("parti")] == [['"42"', "Abstract"], ["a dog", "Animals"]]
    message = error("pickapic")
    assert message.startswith("--prompts pickapic: cannot be read: ")
    assert message.endswith("; the sets with a short name are pickapic-train, pickapic-val, hpsv2, parti")


def test_flags_that_are_given_win_over_those_of_a_set():
    def flags(*words):
        args = evaluate.parse_arguments(["--prompts", *words])
        return args.prompt_column, args.prompt_split, args.category_column

    assert flags("user/prompts") == ("prompt", "train", None)
    assert flags("pickapic-val") == ("caption", "validation_unique", None)
    assert flags("pickapic-val", "--prompt_split", "test_unique") == ("caption", "test_unique", None)
    assert flags("parti") == ("Prompt", None, "Category")
    assert flags("hpsv2", "--category_column", "prompt") == ("prompt", None, "prompt")


CARDS = {
    "hpsv2": {"type": "zhwang/HPDv2", "name": "hpsv2, 3 prompts"},
    "parti": {"type": build_synpic.PARTI_URL, "name": "parti, 3 prompts"},
    "user/prompts": {"type": "user/prompts", "name": "prompts, 3 prompts", "split": "train"},
    "https://me:key@host:1/a/p.txt?token=key#x": {"type": "https://host:1/a/p.txt", "name": "p.txt, 3 prompts"},
    __file__: {"type": "prompts", "name": "test_prompts.py, 3 prompts"},
}


def test_a_card_names_the_prompts_and_no_secret():
    settings = dict.fromkeys(("prompts", "seed", *evaluate.DRAWING_FLAGS), 1) | {"models": {"mine": "x"}}
    figures = {f"clipscore{name}": 0.5 for name in ("", "_lift", "_win_rate")}
    record = {"n_prompts": 3, "settings": settings, "mine": figures, "pairwise": {"clipscore": {}}}
    for prompts, wanted in CARDS.items():
        args = evaluate.parse_arguments(["--prompts", prompts, "--metrics", "clipscore"])
        card = huggingface_hub.RepoCard("---\nlicense: mit\n---\n")
        evaluate.write_card(args, card, "mine", "user/lora", record, "")
        assert "key" not in str(card)
        ((result,),) = (model["results"] for model in huggingface_hub.RepoCard(str(card)).data["model-index"])
        dataset = result["dataset"]
        del dataset["args"]
        assert dataset == wanted
