"""Compares golden runs: `python compare.py A B [names or globs ...]`, two folders that run.py wrote.

Per configuration: "equal" if exit codes, LoRA tensors, ComfyUI tensors, figures of the log and pictures are the same bit
for bit; else what differs, with the largest absolute difference, and that over the largest value of A. Exit code 1 if
anything differs that does not change on purpose.
"""

import argparse
import fnmatch
import json
import math
import sys
from pathlib import Path

from run import CHANGES_ON_PURPOSE, CONFIGS


def read(folder: Path) -> dict | None:
    file = folder / "golden.json"
    return json.loads(file.read_text()) if file.exists() else None


def names_differ(a: dict, b: dict, what: str) -> list[str]:
    found = []
    for label, names in (("only in A", a.keys() - b.keys()), ("only in B", b.keys() - a.keys())):
        if names:
            found.append(f"{what} {label}: {len(names)}, e.g. {min(names)}")
    return found


def sizes(pairs: list[tuple[float, float]]) -> str:
    """The largest differences of pairs of figures."""
    absolute = max(abs(x - y) for x, y in pairs)
    scale = max(abs(x) for x, _ in pairs)
    relative = max(abs(x - y) / abs(x) if x else math.inf if y else 0.0 for x, y in pairs)
    return f"max abs {absolute:.3g}, over the largest value {absolute / scale if scale else math.inf:.3g}, max rel {relative:.3g}"


def lora_differences(a: dict, b: dict, a_folder: Path, b_folder: Path, kind: str) -> list[str]:
    found, a, b = names_differ(a[kind], b[kind], kind), a[kind], b[kind]
    common = a.keys() & b.keys()
    shapes = [n for n in common if (a[n]["shape"], a[n]["dtype"]) != (b[n]["shape"], b[n]["dtype"])]
    if shapes:
        name = min(shapes)
        found.append(f"{kind}: {len(shapes)} other shapes or types, e.g. {name} {a[name]['shape']} {b[name]['shape']}")
    changed = sorted(n for n in common if a[n] != b[n] and n not in shapes)
    if not changed:
        return found
    line = f"{kind}: {len(changed)} of {len(common)} tensors differ"
    x, y = load(a_folder, kind), load(b_folder, kind)
    if all(n in x and n in y for n in changed):
        absolute = {n: (x[n] - y[n]).abs().max().item() for n in changed}
        scale = max(x[n].abs().max().item() for n in changed)
        worst = max(changed, key=absolute.get)
        norm = math.sqrt(sum((x[n] - y[n]).square().sum().item() for n in changed))
        whole = math.sqrt(sum(x[n].square().sum().item() for n in common if n in x)) or math.inf
        line += f": max abs {absolute[worst]:.3g} ({worst}), over the largest weight {absolute[worst] / scale:.3g}"
        line += f", norm of the difference over the norm {norm / whole:.3g}"
    return [*found, line]


def load(folder: Path, kind: str) -> dict:
    from safetensors.torch import load_file

    found = {}
    for file in (folder / "out").rglob("*.safetensors"):
        inner = str(file.relative_to(folder / "out"))
        if "checkpoint-" not in inner and (file.name == "pytorch_lora_weights.safetensors") == (kind == "lora"):
            found |= {name: tensor.double() for name, tensor in load_file(file).items()}
    return found


def log_differences(a: list[dict], b: list[dict]) -> list[str]:
    found, (x, y) = [], ({line["step"]: line for line in log} for log in (a, b))
    if x.keys() != y.keys() or len(a) != len(b):
        found.append(f"log: steps {[line['step'] for line in a]} and {[line['step'] for line in b]}")
    steps = sorted(x.keys() & y.keys())
    keys = list(dict.fromkeys(key for step in steps for key in (*x[step], *y[step])))
    for key in keys:
        here = [step for step in steps if key in x[step] and key in y[step]]
        if len(here) < len([step for step in steps if key in x[step] or key in y[step]]):
            found.append(f"log: {key} is only in {'A' if any(key in x[step] for step in steps) else 'B'}")
        changed = [step for step in here if x[step][key] != y[step][key]]
        numbers = [(x[s][key], y[s][key]) for s in here if all(isinstance(v[s][key], int | float) for v in (x, y))]
        if changed and numbers:
            found.append(f"log: {key:18} {sizes(numbers)}; first at step {changed[0]}")
        elif changed:
            found.append(f"log: {key} differs at step {changed[0]}")
    return found


def differences(a_folder: Path, b_folder: Path, a: dict, b: dict) -> list[str]:
    found = []
    if a["exit_codes"] != b["exit_codes"]:
        found.append(f"exit codes {a['exit_codes']} and {b['exit_codes']}")
    for kind in ("lora", "comfyui"):
        found += lora_differences(a, b, a_folder, b_folder, kind)
    found += log_differences(a["log"], b["log"])
    found += names_differ(a["images"], b["images"], "images")
    if changed := [n for n in a["images"].keys() & b["images"].keys() if a["images"][n] != b["images"][n]]:
        found.append(f"images: other pixels in {', '.join(sorted(changed))}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", type=Path)
    parser.add_argument("b", type=Path)
    parser.add_argument("names", nargs="*")
    args = parser.parse_intermixed_args()
    equal = different = on_purpose = 0
    absent, warned = [], set()
    for name in CONFIGS:
        if args.names and not any(fnmatch.fnmatch(name, pattern) for pattern in args.names):
            continue
        a, b = read(args.a / name), read(args.b / name)
        if a is None or b is None:
            absent += [] if a is b else [f"{name} ({'A' if a is None else 'B'})"]
            continue
        for key in ("cpu", "versions"):
            if a[key] != b[key] and key not in warned:
                warned.add(key)
                print(f"warning: other {key}: {a[key]} and {b[key]}")
        if a["flags"] != b["flags"] or a["stages"] != b["stages"]:
            print(f"warning: {name}: run with other flags")
        found = differences(args.a / name, args.b / name, a, b)
        if not found:
            equal += 1
            counts = f"{len(a['lora'])} tensors, {len(a['log'])} steps, {len(a['images'])} pictures"
            failed = "" if not any(a["exit_codes"]) else f"; BOTH FAILED: exit codes {a['exit_codes']}"
            print(f"{name:42} equal, bit for bit ({counts}){failed}")
            continue
        meant = name in CHANGES_ON_PURPOSE
        different, on_purpose = different + (not meant), on_purpose + meant
        print(f"{name:42} DIFFERS{' (its meaning changes on purpose)' if meant else ''}")
        print("".join(f"    {line}\n" for line in found), end="")
    print(f"{equal} equal, {different} differ, {on_purpose} differ on purpose; absent in one: {', '.join(absent) or 'none'}")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
