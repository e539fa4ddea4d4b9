# SPDX-License-Identifier: Apache-2.0
"""Makes t2i_compbench_rules.json and t2i_compbench_blip.json: what T2I-CompBench's own code gives for the sentences,
detections, weights and pictures below. tests/test_t2i_compbench.py takes the same inputs from this file.

    python make_t2i_compbench.py rules T2I-COMPBENCH
    python make_t2i_compbench.py blip T2I-COMPBENCH BLIP

The arguments are checkouts of github.com/Karine-Huang/T2I-CompBench (1b7094991a57f3c22abdd4f6e8ba6c1a15517073) and
github.com/salesforce/BLIP (056a169437371659074aa2732649d5de3bffb4a8). T2I-CompBench's copy of BLIP has the same vit.py,
med.py and blip.py, its blip_vqa.py adds `vqa_prob`.

`rules` runs the `main` of BLIP_vqa.py, 2D_spatial_eval.py, CLIP_similarity.py and 3_in_1.py. Models, the parser and the
GPU are replaced by stand-ins. Made with Python 3.12, torch 2.15.0, spaCy 3.8.18.

`blip` runs the official model, tiny, and lists the keys of the full-size one. Made with Python 3.11, torch 2.14.1,
torchvision 0.29.1, transformers 4.30.2, tokenizers 0.13.3, timm 0.4.12, numpy 2.4.6, Pillow 12.3.0. The model runs in
float64 (see double.py), on float32 pixels. fairscale is a stand-in: the model takes one function from it, for training.
"""

import ast
import hashlib
import json
import os
import re
import sys
import tempfile
import types
from pathlib import Path

import numpy as np


HERE = Path(__file__).resolve().parent

# ----------------------------------------------------------------------------------------------------------------------
# Sentences, parsed by hand
# ----------------------------------------------------------------------------------------------------------------------


COLORS = "red green blue brown black fluffy wooden metallic oval pentagonal".split()
NOUNS = "bench bowl cat dog horse vase lamp bird phone plate giraffe key girl boy man woman".split()
COMPOUNDS = ["stop sign", "coat rack", "water bottle", "ice cube", "coffee table"]
RELATIONS = ["on the left of", "on the right of", "on the top of", "on the bottom of", "next to", "near", "on side of"]
RELATIONS += ["on top of", "on the side of", "above"]


class Sentence:
    """Words with their parts of speech, heads and relations, and the noun phrases that the grammar put in."""

    def __init__(self):
        self.words, self.pos, self.heads, self.deps, self.phrases = [], [], [], [], []

    def add(self, word: str, pos: str, dep: str, head: int | None = None) -> int:
        """Appends a word; returns its position. Without a head it is the root."""
        position = len(self.words)
        self.words.append(word)
        self.pos.append(pos)
        self.deps.append(dep)
        self.heads.append(position if head is None else head)
        return position

    def phrase(
        self, rng, dep: str, head: int | None = None, article: str = "a", noun: str = "", adjectives=True
    ) -> int:
        """Appends article, adjectives and nouns; returns the position of the last noun."""
        nouns = (noun or (rng.choice(COMPOUNDS) if rng.random() < 0.2 else rng.choice(NOUNS))).split()
        words = rng.choice(COLORS, size=rng.integers(3) if adjectives else 0, replace=False).tolist()
        before = [(article, "DET", "det")] if article else []
        before += [(word, "ADJ", "amod") for word in words] + [(word, "NOUN", "compound") for word in nouns[:-1]]
        last = len(self.words) + len(before)
        for word, pos, kind in before:
            self.add(word, pos, kind, last)
        self.add(str(nouns[-1]), "NOUN", dep, head)
        self.phrases.append(" ".join([word for word, _, _ in before] + [str(nouns[-1])]))
        return last

    def relation(self, words: str, head: int) -> int:
        """Appends the words of a relation; returns the position of the one that the second object depends on."""
        for word in words.split():
            if word in ("left", "right", "top", "bottom", "side"):
                chunk = [word]
                if self.words[-1] == "the":
                    self.heads[-1] = len(self.words)
                    chunk.insert(0, "the")
                self.phrases.append(" ".join(chunk))
                head = self.add(word, "NOUN", "pobj", head)
            elif word == "the":
                self.add(word, "DET", "det", head)
            else:
                head = self.add(word, "ADV" if word == "next" else "ADP", "prep", head)
        return head

    def doc(self, vocab):
        from spacy.tokens import Doc

        return Doc(vocab, words=self.words, pos=self.pos, heads=self.heads, deps=self.deps)


def attribute_sentence(rng) -> Sentence:
    """a red bench and a blue bowl; sometimes plural, sometimes a longer list."""
    sentence = Sentence()
    article = ["a", "", "the"][rng.integers(3)]
    previous = sentence.phrase(rng, "ROOT", article=article)
    long = rng.random() < 0.2
    for _ in range(rng.integers(2, 12) if long else 1):
        sentence.add("and", "CCONJ", "cc", previous)
        noun = str(rng.choice(NOUNS)) if long else ""
        previous = sentence.phrase(rng, "conj", previous, article=article, noun=noun, adjectives=not long)
    return sentence


def spatial_sentence(rng) -> Sentence:
    """a cat on the left of a dog"""
    sentence = Sentence()
    first = sentence.phrase(rng, "ROOT", noun=str(rng.choice(NOUNS)))
    head = sentence.relation(str(rng.choice(RELATIONS)), first)
    sentence.phrase(rng, "pobj", head, noun=str(rng.choice(NOUNS)))
    return sentence


def complex_sentence(rng) -> Sentence:
    """The red hat was on top of the brown coat rack."""
    sentence = Sentence()
    verb = sentence.phrase(rng, "nsubj", article="The") + 1
    sentence.heads[verb - 1] = verb
    sentence.add(str(rng.choice(["is", "was", "sat"])), "VERB", "ROOT")
    head = sentence.relation(str(rng.choice(RELATIONS)), verb)
    sentence.phrase(rng, "pobj", head, article="the")
    if rng.random() < 0.3:
        head = sentence.relation(str(rng.choice(RELATIONS)), verb)
        sentence.phrase(rng, "pobj", head, article="the")
    sentence.add(".", "PUNCT", "punct", verb)
    return sentence


def sentences(kind: str, number: int) -> list[Sentence]:
    """Distinct sentences of one kind."""
    make = {"attribute": attribute_sentence, "spatial": spatial_sentence, "complex": complex_sentence}[kind]
    rng, found = np.random.default_rng(len(kind)), {}
    while len(found) < number:
        sentence = make(rng)
        found.setdefault(" ".join(sentence.words), sentence)
    return list(found.values())


def tagged_docs(vocab, number: int) -> list:
    """Distinct rows of words with parts of speech, no parse: nouns, names and the words of relations in any order."""
    from spacy.tokens import Doc

    rng, found = np.random.default_rng(3), {}
    pieces = [[(word, "NOUN")] for word in NOUNS] + [[(name, "PROPN")] for name in ("Paris", "Tesla", "Rex")] * 3
    pieces += [[(word, "ADP") for word in relation.split()] for relation in RELATIONS + ["on bottom of", "nearby"]] * 3
    pieces += [[("red", "ADJ")], [("the", "DET")], [("is", "VERB")], [(".", "PUNCT")]]
    while len(found) < number:
        tagged = [pair for i in rng.integers(len(pieces), size=rng.integers(1, 9)) for pair in pieces[i]]
        words, pos = zip(*tagged)
        found.setdefault(" ".join(words), Doc(vocab, words=list(words), pos=list(pos)))
    return list(found.values())


# ----------------------------------------------------------------------------------------------------------------------
# Detections and probabilities
# ----------------------------------------------------------------------------------------------------------------------


LABELS = ["person", "dog", "cat", "bench", "bowl", "lamp", "bird", "phone", "horse", "vase", "Rex", "table"]


def detections(number: int, nouns: list[list[str]]) -> list[list[tuple]]:
    """What a detector may find in each image: (label, score, box). Coordinates are multiples of 10, so that centres lie
    in line, 150 pixels apart, or on the diagonal. Most objects of the prompt are among them."""
    rng, images = np.random.default_rng(4), []
    for words in nouns:
        words = ["person" if word in ("girl", "boy", "man", "woman") else word for word in words]
        names = [word for word in words if rng.random() < 0.9] + rng.choice(LABELS, size=rng.integers(3)).tolist()
        found = []
        for name in rng.permutation(names).tolist():
            left, top = (10 * rng.integers(0, 40, size=2)).tolist()
            wide, high = (10 * rng.integers(1, 20, size=2)).tolist()
            score = 1.0 if rng.random() < 0.2 else int(rng.integers(32, 64)) / 64
            found.append((name, score, (float(left), float(top), float(left + wide), float(top + high))))
        images.append(found)
    assert len(images) == number
    return images


def probabilities(prompts: int) -> np.ndarray:
    """(prompts, 8): p(yes) of each question."""
    return np.random.default_rng(5).random((prompts, 8)) ** 0.3


def position_cases(number: int) -> list[tuple]:
    """(relation, box, box), with boxes that touch, cover and miss each other."""
    rng, cases = np.random.default_rng(6), []
    for _ in range(number):
        corners = 10 * rng.integers(0, 30, size=(2, 2))
        sizes = 10 * rng.integers(1, 31, size=(2, 2))
        boxes = [tuple(map(float, (*corner, *(corner + size)))) for corner, size in zip(corners, sizes)]
        cases.append((RELATIONS[rng.integers(len(RELATIONS))], *boxes))
    return cases


SUBSET_PROMPTS = [f"The {color} {noun} was {i}. So" for i, (color, noun) in enumerate(zip(COLORS * 2, NOUNS))]
SUBSETS = {"spatial": [f"{line.upper()} what" for line in SUBSET_PROMPTS[:5]], "action": SUBSET_PROMPTS[4:11]}


def part_scores() -> np.ndarray:
    """(BLIP-VQA, UniDet, CLIP; prompts; 10 images)."""
    return np.random.default_rng(7).random((3, len(SUBSET_PROMPTS), 10))


# ----------------------------------------------------------------------------------------------------------------------
# A tiny BLIP
# ----------------------------------------------------------------------------------------------------------------------


CONFIG = {
    "vision_config": {
        "hidden_size": 24,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "patch_size": 16,
        "image_size": 48,
        "layer_norm_eps": 1e-6,
    },
    "text_config": {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "vocab_size": 30524,
        "max_position_embeddings": 64,
        "layer_norm_eps": 1e-12,
    },
}
QUESTIONS = [
    ["a green bench?", "a blue bowl?", "the Brown coat-rack?"],
    ['The "red" hat (old): #1!?', "dogs? !", "a green bench?"],
    ["word " * 60 + "?", "a very long red green blue bench bowl and so on and so on?", "It's a cat.?"],
    ["a bowl?", "a blue blue blue blue blue bowl?", "~ strange;*?"],
]


def vocabulary() -> list[str]:
    """As many words as BERT's vocabulary, with the special tokens, `yes` and `no` where that has them."""
    words = [f"[unused{number}]" for number in range(30522)]
    known = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 2748: "yes", 2053: "no"}
    letters = "abcdefghijklmnopqrstuvwxyz0123456789?,'-"
    more = "a the green blue red bench bowl brown coat rack hat old dogs word very long and so on it is cat".split()
    pieces = [*letters, *(f"##{letter}" for letter in letters), *(word for word in more if len(word) > 1)]
    known |= {1000 + number: word for number, word in enumerate(pieces)}
    for position, word in known.items():
        words[position] = word
    return words


def weight(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Float32 numbers that depend on the key alone; the answer's words share theirs with the words of the decoder."""
    key = key.replace("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight")
    key = key.replace("cls.predictions.decoder.bias", "cls.predictions.bias")
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big"))
    scale = 3 / np.sqrt(shape[-1]) if len(shape) > 1 and "embed" not in key else 0.5
    return (float(bool(re.search(r"(?i)norm\d?\.weight", key))) + scale * rng.standard_normal(shape)).astype(np.float32)


def pictures() -> list[np.ndarray]:
    """(high, wide, 3), uint8, of several shapes."""
    rng = np.random.default_rng(8)
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((64, 64), (48, 48), (50, 90), (33, 20))]


# ----------------------------------------------------------------------------------------------------------------------
# The official rules
# ----------------------------------------------------------------------------------------------------------------------


def stand_in(name: str, **content) -> None:
    """Puts a module with this content in the place of one that is not needed."""
    for end in [i for i, letter in enumerate(name) if letter == "."]:
        sys.modules.setdefault(name[:end], types.ModuleType(name[:end]))
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(content)


def official_main(file: Path, folder: Path, *arguments: str, edit=lambda text: text) -> dict:
    """Runs a script of the repository as `__main__`, in this folder."""
    sys.argv = [file.name, *arguments]
    os.chdir(folder)
    names = {"__name__": "__main__", "__file__": str(file)}
    exec(compile(edit(file.read_text()), str(file), "exec"), names)
    return names


def answers(file: Path) -> list[float]:
    return [float(record["answer"]) for record in json.loads(file.read_text())]


def sample_folder(folder: Path, prompts: list[str]) -> Path:
    (folder / "samples").mkdir(parents=True)
    for number, prompt in enumerate(prompts):
        (folder / "samples" / f"{prompt}_{number:06}.png").touch()
    return folder


def blip_rules(official: Path, work: Path, parsed: dict, given: np.ndarray) -> dict:
    """BLIP_vqa.py: the questions of each prompt, and the score from given probabilities."""
    asked = {prompt: [] for prompt in parsed}

    def answer(annotations: str, output: str) -> None:
        slot = int(re.search(r"annotation(\d+)_blip", annotations)[1]) - 1
        records = json.loads(Path(annotations, "vqa_test.json").read_text())
        for record in records:
            if record["question"]:
                asked[Path(record["image"]).name.split("_")[0]].append(record["question"])
        written = [{"question_id": i, "answer": f"{given[i, slot]:.4f}"} for i in range(len(records))]
        Path(output, "result").mkdir()
        Path(output, "result", "vqa_result.json").write_text(json.dumps(written))

    stand_in("BLIP.train_vqa_func", VQA_main=answer)
    folder = sample_folder(work / "blip", list(parsed))
    script = official / "BLIPvqa_eval/BLIP_vqa.py"
    official_main(script, work, "--out_dir", str(folder), edit=lambda text: text.replace("'cuda'", "'cpu'"))
    return {"questions": list(asked.values()), "vqa_score": answers(folder / "annotation_blip/vqa_result.json")}


def spatial_rules(official: Path, work: Path, prompts: list[str], images: list, complex: bool) -> list[float]:
    """2D_spatial_eval.py: the score of each image from given detections."""
    import torch

    class Dataset:
        def __init__(self, folder: str, transform):
            files = sorted(os.listdir(f"{folder}/samples"), key=lambda name: int(name.split("_")[1].split(".")[0]))
            self.rows = [{"image": torch.zeros(1, 2, 2), "image_path": f"{folder}/samples/{file}"} for file in files]

    class Loader:
        def __init__(self, dataset, **options):
            self.dataset = dataset

        def __len__(self):
            return 1

        def __iter__(self):
            yield self.dataset.rows

    def model(rows: list) -> list:
        found = []
        for row in rows:
            labels, scores, boxes = zip(
                *images[int(row["image_path"].split("_")[-1][:6])] or [("table", 0.1, (0,) * 4)]
            )
            ids = torch.tensor([names.index(label) for label in labels])
            boxes = types.SimpleNamespace(tensor=torch.tensor(boxes))
            fields = {"pred_boxes": boxes, "pred_classes": ids, "scores": torch.tensor(scores)}
            found.append({"instances": types.SimpleNamespace(get_fields=lambda fields=fields: fields)})
        return found

    names = sorted({label for found in images for label, _, _ in found} | {"table"})
    accelerator = types.SimpleNamespace(prepare=lambda model, loader: (model, loader))
    stand_in("accelerate", Accelerator=lambda **options: accelerator)
    stand_in("ruamel_yaml", load=lambda *arguments, **options: {}, Loader=None)
    stand_in("experts.model_bank", load_expert_model=lambda **options: (model, None))
    stand_in("experts.obj_detection.generate_dataset", Dataset=Dataset, collate_fn=None)
    torch.load = lambda file: {"labels": names}
    torch.utils.data.DataLoader = Loader
    folder = sample_folder(work / f"spatial{complex}", prompts)
    (work / "configs").mkdir(exist_ok=True)
    (work / "configs/experts.yaml").touch()
    flags = ["--complex", "True"] if complex else []
    official_main(official / "UniDet_eval/2D_spatial_eval.py", work, "--outpath", str(folder), *flags)
    return answers(folder / "labels/annotation_obj_detection_2d/vqa_result.json")


def clip_rules(official: Path, work: Path, prompts: list[str]) -> list[str]:
    """CLIP_similarity.py: the text of a complex prompt that reaches CLIP."""
    import torch
    from PIL import Image

    texts, vector = [], types.SimpleNamespace(to=lambda device: torch.ones(1, 2))
    model = types.SimpleNamespace(encode_image=lambda image: torch.ones(1, 2), encode_text=lambda text: text)
    preprocess = types.SimpleNamespace(unsqueeze=lambda axis: vector)
    stand_in(
        "clip",
        load=lambda name, device: (model, lambda image: preprocess),
        tokenize=lambda text: texts.append(text) or vector,
    )
    vector.to = lambda device: torch.ones(1, 2)
    Image.open = lambda file: None
    folder = sample_folder(work / "clip", prompts)
    script = official / "CLIPScore_eval/CLIP_similarity.py"
    official_main(script, work, "--outpath", str(folder), "--complex", "True")
    return texts


def three_in_one(official: Path, work: Path) -> list[float]:
    """3_in_1.py: the score of each image from given scores of its parts."""
    folder, lists = work / "three", {"": SUBSET_PROMPTS, **{f"_{kind}": lines for kind, lines in SUBSETS.items()}}
    places = ("annotation_blip", "labels/annotation_obj_detection_2d", "annotation_clip")
    for place, scores in zip(places, part_scores()):
        (folder / place).mkdir(parents=True)
        records = [{"question_id": i, "answer": score} for i, score in enumerate(scores.ravel().tolist())]
        (folder / place / "vqa_result.json").write_text(json.dumps(records))
    for ending, lines in lists.items():
        (folder / f"complex_val{ending}.txt").write_text("\n".join(lines))
    script = official / "3_in_1_eval/3_in_1.py"
    official_main(script, work, "--outpath", str(folder), "--data_path", str(folder))
    return answers(folder / "annotation_3_in_1/vqa_result.json")


def make_rules(official: Path) -> None:
    import spacy

    vocab = spacy.blank("en").vocab
    asked = {
        kind: [sentence.doc(vocab) for sentence in sentences(kind, 120)] for kind in ("attribute", "spatial", "complex")
    }
    parsed = {doc.text.strip(): doc for docs in asked.values() for doc in docs}
    tagged = {doc.text.strip(): doc for doc in tagged_docs(vocab, 500)}
    everything = {**tagged, **parsed}
    spacy.load = lambda name: lambda text: everything[text]
    spatial, complex = asked["spatial"], asked["complex"]
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        record = blip_rules(official, work, parsed, probabilities(len(parsed)))
        for name, docs, flag in (("spatial", spatial * 4, False), ("complex", [*complex, *tagged.values()], True)):
            images = detections(len(docs), [[t.text for t in doc if t.pos_ in ("NOUN", "PROPN")] for doc in docs])
            record[name] = spatial_rules(official, work, [doc.text.strip() for doc in docs], images, flag)
        record["clip_text"] = clip_rules(official, work, [doc.text.strip() for doc in complex])
        record["three_in_one"] = three_in_one(official, work)
        record["position"] = official_positions(official)
    (HERE / "t2i_compbench_rules.json").write_text(json.dumps(record) + "\n")


def official_positions(official: Path) -> list[float]:
    """`determine_position` for the cases above."""
    tree = ast.parse((official / "UniDet_eval/2D_spatial_eval.py").read_text())
    tree.body = [node for node in tree.body if getattr(node, "name", None) == "determine_position"]
    names, keys = {}, ("x_min", "y_min", "x_max", "y_max")
    exec(compile(tree, "2D_spatial_eval.py", "exec"), names)
    return [
        names["determine_position"](relation, dict(zip(keys, box1)), dict(zip(keys, box2)))
        for relation, box1, box2 in position_cases(1500)
    ]


# ----------------------------------------------------------------------------------------------------------------------
# The official model
# ----------------------------------------------------------------------------------------------------------------------


def make_blip(official: Path, blip: Path) -> None:
    import torch
    from double import in_float64
    from PIL import Image
    from torchvision import transforms
    from torchvision.transforms import InterpolationMode

    stand_in("fairscale.nn.checkpoint.checkpoint_activations", checkpoint_wrapper=None)
    sys.path.insert(0, str(official / "BLIPvqa_eval"))
    for name in ("vit", "med"):  # what is compared is BLIP's own
        texts = [(root / f"models/{name}.py").read_text() for root in (blip, official / "BLIPvqa_eval")]
        assert len({"".join(text.split()) for text in texts}) == 1, name
    record = {}
    with tempfile.TemporaryDirectory() as work:
        os.chdir(work)
        Path("bert-base-uncased").mkdir()
        Path("bert-base-uncased/vocab.txt").write_text("\n".join(vocabulary()) + "\n")
        import models.blip_vqa as module
        from models.vit import VisionTransformer

        full = module.blip_vqa(med_config=str(official / "BLIPvqa_eval/configs/med_config.json"), image_size=480)
        keys = {}
        for key, value in full.state_dict().items():
            entry = keys.setdefault(re.sub(r"\.\d+\.", ".#.", key), {"shape": list(value.shape), "number": 0})
            assert entry["shape"] == list(value.shape)
            entry["number"] += 1
        record["full_size_keys"] = keys
        vision, text = full.visual_encoder, full.text_decoder.config
        block = vision.blocks[0]
        record["full_size"] = {
            "image_size": vision.patch_embed.img_size[0],
            "vision": [block.attn.num_heads, type(block.mlp.act).__name__.lower(), block.norm1.eps],
            "text": [text.num_attention_heads, text.hidden_act, text.layer_norm_eps],
        }
        del full

        vision, text = CONFIG["vision_config"], CONFIG["text_config"]
        med = json.loads((official / "BLIPvqa_eval/configs/med_config.json").read_text())
        Path("med.json").write_text(json.dumps({**med, **text, "encoder_width": text["hidden_size"]}))

        def tiny_vit(vit, image_size, use_grad_checkpointing=False, ckpt_layer=0, drop_path_rate=0):
            sizes = {"img_size": image_size, "patch_size": 16, "embed_dim": vision["hidden_size"], "depth": 2}
            return VisionTransformer(**sizes, num_heads=4, drop_path_rate=drop_path_rate), vision["hidden_size"]

        module.create_vit = tiny_vit
        model = module.blip_vqa(med_config="med.json", image_size=vision["image_size"]).eval()
        given = {
            key: value if key.endswith("position_ids") else torch.from_numpy(weight(key, tuple(value.shape)))
            for key, value in model.state_dict().items()
        }
        model.load_state_dict(given, strict=True)
        record["tiny_keys"] = {key: list(value.shape) for key, value in given.items()}

        size = (vision["image_size"],) * 2
        names = {"transforms": transforms, "InterpolationMode": InterpolationMode, "config": {"image_size": size[0]}}
        names["normalize"] = transforms.Normalize(*clip_statistics(official))
        transform = eval(assigned(official / "BLIPvqa_eval/data/__init__.py", "transform_test"), names)
        names = {"re": re}
        exec(defined(official / "BLIPvqa_eval/data/utils.py", "pre_question"), names)
        pixels = [transform(Image.fromarray(picture)) for picture in pictures()]
        asked = [[names["pre_question"](question) for question in row] for row in QUESTIONS]
        record["cleaned"] = asked
        in_float64(model)
        exact, found = model.vqa_prob, []
        model.vqa_prob = lambda *arguments: found.append(exact(*arguments)) or found[-1]
        with torch.no_grad():
            for slot in range(3):  # as in the official code: one question of each image at a time, padded
                column = [row[slot] for row in asked]
                rounded = model(torch.stack(pixels), column, train=False, inference="vqa_prob")
                assert rounded == [f"{value:.4f}" for value in found[-1].tolist()]
        record["probabilities"] = torch.stack(found, dim=1).tolist()
        ids = [model.tokenizer(row, padding=False, truncation=True, max_length=35).input_ids for row in asked]
        record["tokens"] = [[[model.tokenizer.enc_token_id, *one[1:]] for one in row] for row in ids]
        record["pixel_sums"] = [float(one.double().abs().sum()) for one in pixels]
    (HERE / "t2i_compbench_blip.json").write_text(json.dumps(record) + "\n")


def clip_statistics(official: Path) -> tuple:
    call = ast.parse(assigned(official / "BLIPvqa_eval/data/__init__.py", "normalize"), mode="eval").body
    return tuple(ast.literal_eval(argument) for argument in call.args)


def assigned(file: Path, name: str) -> str:
    """The expression that a file assigns to this name."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == name:
            return ast.unparse(node.value)
    raise LookupError(name)


def defined(file: Path, name: str) -> str:
    """The text of a file's function."""
    return next(ast.unparse(node) for node in ast.parse(file.read_text()).body if getattr(node, "name", None) == name)


if __name__ == "__main__":
    folders = [Path(folder).resolve() for folder in sys.argv[2:]]
    {"rules": make_rules, "blip": make_blip}[sys.argv[1]](*folders)
