"""Trains the mini prior on the teacher's trees (`teacher.py`); maintainers only.

    python train.py tokenizer --model SMOLLM2_DIR --trees TREES_DIR --out ..        -> tokenizer of about 2,800 of the teacher's tokens
    python train.py fit       --model SMOLLM2_DIR --trees TREES_DIR --out .. --steps 5000 [--seed 0]
    python train.py evaluate  --model SMOLLM2_DIR --trees TREES_DIR --out ..        -> bits per byte on held-out draws, as JSON

Vocabulary: the teacher's byte alphabet and its most used tokens, closed under the merges that build them; every other token is
spelt in kept ones, along the teacher's own merges. Loss at a prefix u of the tree, over kept tokens v:

    - sum_v p_u(v) log q(v | prompt, u)        p_u(v): the teacher's mass on all tokens whose spelling starts with v

inside a spelling the label is the next piece; newline and the teacher's special tokens are EOS, and so is what follows `. ! ?`.
Draws are visited in proportion to their counts; of each prompt's distinct draws one in twenty (by hash) is held out.
"""

import argparse
import hashlib
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from teacher import END, Teacher
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

EOS = "<|endoftext|>"
VOCABULARY = 2816
LEAVES, PROMPTS = 16, 24  # draws a prompt and prompts a step


def trees(folder: str) -> dict[str, dict[str, np.ndarray]]:
    return {p.stem: dict(np.load(p, allow_pickle=False)) for p in sorted(Path(folder).glob("*.npz"))}


def make_tokenizer(args: argparse.Namespace) -> None:
    """Keeps the byte alphabet, every token of the prompts, and the tokens with the largest expected counts."""
    source = AutoTokenizer.from_pretrained(args.model)
    spec = json.loads(source.backend_tokenizer.to_str())
    vocabulary: dict[str, int] = spec["model"]["vocab"]
    names = {i: t for t, i in vocabulary.items()}
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in spec["model"]["merges"]]
    parents = {a + b: (a, b) for a, b in reversed(merges)}  # the first merge that builds a token
    mass = np.zeros(len(vocabulary) + 1)
    for tree in trees(args.trees).values():
        counts = tree["count"][tree["node"]][:, None] * tree["probs"].astype(np.float64)
        np.add.at(mass, tree["ids"].ravel().astype(int), counts.ravel())
        for token in source.encode(str(tree["text"]), add_special_tokens=False):
            mass[token] += 1e9
    special = {a["content"] for a in spec["added_tokens"]}
    alphabet = [t for t in vocabulary if len(t) == 1]
    kept = set(alphabet)

    def with_parts(token: str) -> set[str]:
        if token in kept:
            return set()
        return {token}.union(*(with_parts(part) for part in parents[token])) if token in parents else set()

    for i in np.argsort(-mass, kind="stable"):
        token = names.get(int(i))
        if token is None or token in special or "Ċ" in token or mass[i] <= 0:
            continue
        new = with_parts(token)
        if len(kept) + len(new) + 1 <= VOCABULARY:
            kept |= new
    order = [EOS, *sorted(kept, key=vocabulary.__getitem__)]
    spec["model"]["vocab"] = {t: i for i, t in enumerate(order)}
    spec["model"]["merges"] = [list(m) for m in merges if m[0] in kept and m[1] in kept and m[0] + m[1] in kept]
    spec["model"]["unk_token"] = None
    spec["added_tokens"] = [{**spec["added_tokens"][0], "id": 0, "content": EOS}]
    spec["post_processor"] = None
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spec)), eos_token=EOS, pad_token=EOS)
    made.save_pretrained(args.out)
    total = mass[mass < 1e9].sum()
    covered = sum(mass[vocabulary[t]] for t in kept if mass[vocabulary[t]] < 1e9)
    print(f"{len(order)} tokens, {len(spec['model']['merges'])} merges; they hold {covered / total:.4f} of the expected counts")


class Spelling:
    """Teacher tokens in pieces of the mini vocabulary."""

    def __init__(self, teacher: Teacher, mini: PreTrainedTokenizerFast):
        size = len(teacher.embed)
        texts = [teacher.tokenizer.convert_ids_to_tokens(i) for i in range(size)]
        vocabulary, model = mini.get_vocab(), mini.backend_tokenizer.model
        self.pieces: list[list[int]] = []
        for i, text in enumerate(texts):
            if teacher.stops[i]:
                self.pieces.append([0])
            elif text in vocabulary:
                self.pieces.append([vocabulary[text]])
            else:
                self.pieces.append([t.id for t in model.tokenize(text)])
        self.first = np.array([p[0] for p in self.pieces], np.int64)
        self.closes = teacher.closes


def held_out(prompt: str, tokens: list[int]) -> bool:
    return hashlib.sha256(f"{prompt}{tokens}".encode()).digest()[0] < 13  # 13 of 256: one in twenty


class Corpus:
    """Every draw of every prompt as pieces, with soft labels: for draw d and position t, LABELS token ids and probabilities."""

    def __init__(self, folder: str, spelling: Spelling, mini: PreTrainedTokenizerFast):
        self.prompts, self.draws, self.held = [], [], []
        for name, tree in trees(folder).items():
            text = str(tree["text"])
            prompt = mini.encode(text, add_special_tokens=False)
            law = {int(n): i for i, n in enumerate(tree["node"])}
            first = spelling.first[tree["ids"].astype(int)]  # [laws, 48]
            probs = tree["probs"].astype(np.float32)
            inner = set(tree["parent"].tolist())
            rows, held = [], []
            for leaf in range(1, len(tree["parent"])):
                if leaf in inner:
                    continue
                path, at = [], leaf
                while at >= 0:
                    path.append(at)
                    at = int(tree["parent"][at])
                path = path[::-1]
                pieces, labels = [], []  # labels: index of a law, or -1 - piece for a certain one
                tokens = [int(t) for t in tree["token"][path[1:]]]
                for up, token in zip(path, tokens, strict=False):  # the leaf has no next token
                    labels.append(law[up])
                    if token == END:
                        pieces.append(0)
                        continue
                    spelt = spelling.pieces[token]
                    pieces += spelt
                    labels += [-1 - p for p in spelt[1:]]
                    if spelling.closes[token]:
                        pieces.append(0)
                        labels.append(-1)
                row = (np.array(pieces, np.int64), np.array(labels, np.int64), tokens)
                (held if held_out(text, tokens) else rows).append((row, int(tree["count"][leaf])))
            w = np.array([c for _, c in rows], np.float64)
            self.prompts.append({"name": name, "text": text, "ids": prompt, "first": first, "probs": probs})
            self.draws.append(([r for r, _ in rows], np.cumsum(w / w.sum())))
            self.held.append(held)

    def batch(self, rng: np.random.Generator):
        """Rows of one prompt and LEAVES draws each, tree-packed: ids [P, S], positions, mask, and label arrays for the loss."""
        picked = rng.choice(len(self.prompts), PROMPTS, replace=False)
        layouts = []
        for p in picked:
            rows, cumulative = self.draws[p]
            draws = [rows[i] for i in np.searchsorted(cumulative, rng.random(LEAVES))]
            layouts.append((self.prompts[p], draws))
        width = max(len(q["ids"]) + sum(len(d[0]) - 1 for d in draws) for q, draws in layouts)
        ids = np.zeros((PROMPTS, width), np.int64)
        position = np.zeros((PROMPTS, width), np.int64)
        group = np.full((PROMPTS, width), -2, np.int64)  # -1: prompt, -2: padding, k: draw k
        where, label_ids, label_probs = [], [], []
        for n, (q, draws) in enumerate(layouts):
            L = len(q["ids"])
            ids[n, :L], position[n, :L], group[n, :L] = q["ids"], np.arange(L), -1
            at = L
            for k, (pieces, labels, _) in enumerate(draws):
                T = len(pieces)
                ids[n, at : at + T - 1] = pieces[:-1]
                position[n, at : at + T - 1] = L + np.arange(T - 1)
                group[n, at : at + T - 1] = k
                where += [n * width + L - 1, *(n * width + at + np.arange(T - 1))]
                soft = labels >= 0
                i = np.where(soft[:, None], q["first"][np.where(soft, labels, 0)], 0)
                w = np.where(soft[:, None], q["probs"][np.where(soft, labels, 0)], 0.0)
                i[~soft, 0], w[~soft, 0] = -1 - labels[~soft], 1.0
                label_ids.append(i)
                label_probs.append(w)
                at += T - 1
        g, pos = torch.from_numpy(group), torch.from_numpy(position)
        see = (g[:, None, :] == -1) | (g[:, :, None] == g[:, None, :])
        see &= pos[:, :, None] >= pos[:, None, :]
        see |= torch.eye(width, dtype=torch.bool)[None]
        mask = torch.zeros(see.shape).masked_fill_(~see, -torch.inf)[:, None]
        probs = torch.from_numpy(np.concatenate(label_probs))
        return (
            torch.from_numpy(ids),
            pos,
            mask,
            torch.tensor(where),
            torch.from_numpy(np.concatenate(label_ids)),
            probs / probs.sum(1, keepdim=True),
        )


def fit(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    teacher, mini = Teacher(args.model), PreTrainedTokenizerFast.from_pretrained(args.out)
    spelling = Spelling(teacher, mini)
    start = time.time()
    corpus = Corpus(args.trees, spelling, mini)
    print(
        f"{len(corpus.prompts)} prompts, {sum(len(d[0]) for d in corpus.draws)} distinct draws, read in {time.time() - start:.0f} s",
        flush=True,
    )
    width = 128
    config = LlamaConfig(
        vocab_size=len(mini), hidden_size=width, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
        max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    rows = torch.tensor([teacher.tokenizer.convert_tokens_to_ids(t) for t in mini.convert_ids_to_tokens(range(len(mini)))])
    known = teacher.embed[rows].float()
    known = known - known.mean(0)
    _, _, axes = torch.linalg.svd(known, full_matrices=False)
    start_at = known @ axes[:width].T  # the teacher's own embeddings, on their first 128 principal axes
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(start_at / start_at.std() * 0.02)
    del teacher
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    adam = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}], lr=args.lr, betas=(0.9, 0.98)
    )
    rng = np.random.default_rng(args.seed)
    running, start = 0.0, time.time()
    for step in range(args.steps):
        warm = min(1.0, (step + 1) / 100)
        rate = args.lr * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / args.steps)))
        for group in adam.param_groups:
            group["lr"] = rate
        ids, position, mask, where, labels, probs = corpus.batch(rng)
        hidden = model.model(input_ids=ids, position_ids=position, attention_mask=mask, use_cache=False)[0]
        logits = model.lm_head(hidden.reshape(-1, width)[where])
        loss = (logits.logsumexp(1) - (logits.gather(1, labels) * probs).sum(1)).mean()
        adam.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        running += loss.item()
        if (step + 1) % args.every == 0:
            s = time.time() - start
            print(
                f"step {step + 1}/{args.steps} loss {running / args.every:.4f} nats a token, {s:.0f} s, {s / (step + 1):.2f} s a step",
                flush=True,
            )
            running = 0.0
        if (step + 1) % 500 == 0 or step + 1 == args.steps:
            model.save_pretrained(args.out)


def evaluate(args: argparse.Namespace) -> None:
    """Bits per byte of held-out draws: the text of the continuation alone, EOS left out, for mini and for SmolLM2 at temperature 1."""
    torch.set_num_threads(args.threads)
    teacher, mini = Teacher(args.model), PreTrainedTokenizerFast.from_pretrained(args.out)
    spelling = Spelling(teacher, mini)
    corpus = Corpus(args.trees, spelling, mini)
    small, large = (
        LlamaForCausalLM.from_pretrained(args.out).eval(),
        LlamaForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval(),
    )

    @torch.no_grad()
    def nats(model, prompt, rows):
        width = max(len(r) for r in rows)
        ids = torch.tensor([prompt + r + [0] * (width - len(r)) for r in rows])
        logp = model(ids).logits[:, len(prompt) - 1 : -1].log_softmax(-1).gather(2, ids[:, len(prompt) :, None])[..., 0]
        return sum(float(logp[i, : len(r)].sum()) for i, r in enumerate(rows))

    families: dict[str, dict[str, float]] = {}
    for q, held in zip(corpus.prompts, corpus.held, strict=True):
        rng = np.random.default_rng(0)
        w = np.array([c for _, c in held], np.float64)
        if not len(w):
            continue
        chosen = [held[i][0] for i in rng.choice(len(held), min(10, len(held)), p=w / w.sum())]
        chosen = [r for r in chosen if any(t != END for t in r[2])]
        if not chosen:
            continue
        teacher_rows = [[t for t in r[2] if t != END] for r in chosen]
        mini_rows = [[p for t in row for p in spelling.pieces[t]] for row in teacher_rows]
        size = sum(len(teacher.tokenizer.decode(row).encode()) for row in teacher_rows)
        family, split = q["name"].split("-")[:2]
        for key in (family, f"{family}/{split}"):
            f = families.setdefault(key, {"mini": 0.0, "smollm2": 0.0, "bytes": 0, "draws": 0})
            f["bytes"] += size
            f["draws"] += len(chosen)
        a = nats(small, q["ids"], mini_rows)
        b = nats(large, teacher.tokenizer.encode(q["text"], add_special_tokens=False), teacher_rows)
        for key in (family, f"{family}/{split}"):
            families[key]["mini"] -= a
            families[key]["smollm2"] -= b
    out = {}
    for key, f in sorted(families.items()):
        bits = {m: f[m] / math.log(2) / f["bytes"] for m in ("mini", "smollm2")}
        out[key] = {**{m: round(v, 3) for m, v in bits.items()}, "ratio": round(bits["mini"] / bits["smollm2"], 3), "draws": f["draws"]}
        print(key, out[key], flush=True)
    (Path(args.out) / "bits_per_byte.json").write_text(json.dumps(out, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["tokenizer", "fit", "evaluate"])
    parser.add_argument("--model", required=True)
    parser.add_argument("--trees", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--every", type=int, default=50, help="steps between log lines")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    {"tokenizer": make_tokenizer, "fit": fit, "evaluate": evaluate}[args.stage](args)


if __name__ == "__main__":
    main()
