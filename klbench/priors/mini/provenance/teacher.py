"""Draws from the teacher, kept as a tree: every distinct prefix once, with its count and the teacher's next-token law.

The teacher is SmolLM2-135M-Instruct (Apache-2.0) at temperature 0.75 restricted to its 48 likeliest tokens. K draws of one
prompt share most of their first tokens, so each distinct prefix is computed once and its children are drawn together:

    node u:  count n_u,  law p_u over 48 tokens;   (n_children) ~ Multinomial(n_u, p_u)

which is the same distribution as K independent draws. The mini prior then learns the laws p_u with weights n_u, instead of one
sampled token a position (`train.py`). A draw ends at a newline, at one of the teacher's special tokens, after `. ! ?`, or at the
length limit.

Maintainers only; nothing here is imported by klbench.

    python teacher.py --model SMOLLM2_DIR --prompts prompts.jsonl --out TREES_DIR [--draws 1000] [--seed 0]

`prompts.jsonl` has a row a prompt: {"id", "text", "draws", "tokens"}.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, LlamaForCausalLM

TEMPERATURE, TOP = 0.75, 48
END = 65535  # stands for "the draw ends here" among uint16 token ids


class Teacher:
    """Llama weights in bf16 with the two matmuls of a layer's halves fused; serves one prompt at a time."""

    def __init__(self, folder: str):
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        c = model.config
        self.heads, self.kv, self.width = c.num_attention_heads, c.num_key_value_heads, c.hidden_size // c.num_attention_heads
        self.eps = c.rms_norm_eps
        half = lambda *parts: torch.cat([p.detach() for p in parts]).bfloat16()  # noqa: E731
        self.layers = [
            (
                layer.input_layernorm.weight.detach(),
                half(layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight, layer.self_attn.v_proj.weight),
                half(layer.self_attn.o_proj.weight),
                layer.post_attention_layernorm.weight.detach(),
                half(layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight),
                half(layer.mlp.down_proj.weight),
            )
            for layer in model.model.layers
        ]
        self.norm_out = model.model.norm.weight.detach()
        self.embed = model.get_input_embeddings().weight.detach().bfloat16()
        cos, sin = model.model.rotary_emb(torch.zeros(1, 1, 1), torch.arange(256)[None])
        self.cos, self.sin = cos[0], sin[0]
        texts = [self.tokenizer.decode([i]) for i in range(len(self.embed))]
        special = set(self.tokenizer.all_special_ids) | set(range(17))
        self.stops = np.array([i in special or "\n" in t for i, t in enumerate(texts)])  # the draw ends before this token
        self.closes = np.array([t.rstrip("\"')”’").endswith((".", "!", "?")) for t in texts])  # the draw ends after it

    def norm(self, x, weight):
        y = x.float()
        return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps) * weight).bfloat16()

    def rotate(self, x, cos, sin):
        a, b = x.float().chunk(2, -1)
        return (x.float() * cos + torch.cat([-b, a], -1) * sin).bfloat16()

    @torch.no_grad()
    def step(self, tokens, position, prompt_kv, kv):
        """tokens [U, S] at `position`.. -> logits [U, V] of the last one, new keys and values a layer, each [U, kv, S, D]."""
        U, S = tokens.shape
        x = F.embedding(tokens, self.embed)
        cos, sin = self.cos[position : position + S][None, :, None], self.sin[position : position + S][None, :, None]
        fresh, group = [], self.heads // self.kv
        for i, (norm1, qkv_w, o_w, norm2, gate_up_w, down_w) in enumerate(self.layers):
            qkv = F.linear(self.norm(x, norm1), qkv_w).view(U, S, self.heads + 2 * self.kv, self.width)
            qk = self.rotate(qkv[:, :, : self.heads + self.kv], cos, sin)
            q, k, v = qk[:, :, : self.heads], qk[:, :, self.heads :], qkv[:, :, self.heads + self.kv :]
            k, v = k.transpose(1, 2), v.transpose(1, 2)  # [U, kv, S, D]
            fresh.append((k, v))
            if prompt_kv is None:
                out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
            else:
                keys, values = torch.cat([kv[i][0], k], 2), torch.cat([kv[i][1], v], 2)  # [U, kv, t, D]
                pk, pv = prompt_kv[i]  # [kv, L, D], shared by all rows
                L = pk.shape[1]
                qg = q.view(U, self.kv, group, self.width)
                to_prompt = torch.matmul(qg.transpose(0, 1).reshape(self.kv, U * group, self.width), pk.transpose(1, 2))
                to_prompt = to_prompt.view(self.kv, U, group, L).transpose(0, 1)
                weights = torch.cat([to_prompt, qg @ keys.transpose(-1, -2)], -1).float() * self.width**-0.5
                weights = weights.softmax(-1).bfloat16()
                out = (weights[..., :L].transpose(0, 1).reshape(self.kv, U * group, L) @ pv).view(self.kv, U, group, self.width)
                out = out.transpose(0, 1) + weights[..., L:] @ values
            x = x + F.linear(out.reshape(U, S, -1), o_w)
            gate, up = F.linear(self.norm(x, norm2), gate_up_w).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, down_w)
        return F.linear(self.norm(x[:, -1], self.norm_out), self.embed), fresh

    def law(self, logits):
        """The 48 likeliest tokens and their probabilities at the temperature, [U, 48] each (exact top-k by blocks of 64)."""
        U, V = logits.shape
        blocks = logits.view(U, V // 64, 64)
        best = blocks.amax(-1).topk(TOP, sorted=False).indices
        values = blocks.gather(1, best[..., None].expand(-1, -1, 64)).reshape(U, -1)
        top, at = values.topk(TOP)
        ids = best.gather(1, at // 64) * 64 + at % 64
        return ids.numpy(), (top.double() / TEMPERATURE).softmax(-1).numpy()

    def tree(self, text, draws, length, rng, rows=768):
        """Arrays of one prompt's tree: parent, token, count a node; ids, probs [., 48] for nodes that were expanded."""
        prompt = torch.tensor([self.tokenizer.encode(text, add_special_tokens=False)])
        logits, kv = self.step(prompt, 0, None, None)
        prompt_kv = [(k[0], v[0]) for k, v in kv]
        L = prompt.shape[1]
        nodes = {"parent": [-1], "token": [END], "count": [draws]}
        laws = {"node": [0], "ids": [], "probs": []}
        ids, probs = self.law(logits)
        level, counts, cache = np.array([0]), np.array([draws]), None
        for depth in range(length):
            laws["ids"].append(ids.astype(np.uint16))
            laws["probs"].append(probs.astype(np.float16))
            drawn = rng.multinomial(counts, probs)  # [U, 48]
            up, col = np.nonzero(drawn)
            token, count = ids[up, col], drawn[up, col]
            ended = self.stops[token]
            first = len(nodes["parent"])
            nodes["parent"] += level[up].tolist()
            nodes["token"] += np.where(ended, END, token).tolist()
            nodes["count"] += count.tolist()
            alive = ~ended & ~self.closes[token]
            if depth + 1 == length or not alive.any():
                break
            up, token, counts = up[alive], token[alive], count[alive]
            level = first + np.flatnonzero(alive)
            laws["node"] += level.tolist()
            parts_ids, parts_probs, parts_kv = [], [], []
            for a in range(0, len(level), rows):
                pick = torch.from_numpy(up[a : a + rows])
                empty = lambda u: torch.empty(u, self.kv, 0, self.width, dtype=torch.bfloat16)  # noqa: E731
                past = [(empty(len(pick)),) * 2 if cache is None else (k[pick], v[pick]) for k, v in (cache or prompt_kv)]
                logits, fresh = self.step(torch.from_numpy(token[a : a + rows])[:, None], L + depth, prompt_kv, past)
                i, p = self.law(logits)
                parts_ids.append(i)
                parts_probs.append(p)
                if depth + 2 < length:
                    parts_kv.append([(torch.cat([k, nk], 2), torch.cat([v, nv], 2)) for (k, v), (nk, nv) in zip(past, fresh, strict=True)])
            ids, probs = np.concatenate(parts_ids), np.concatenate(parts_probs)
            if parts_kv:
                cache = [tuple(torch.cat([part[i][j] for part in parts_kv]) for j in (0, 1)) for i in range(len(self.layers))]
        return {
            "parent": np.array(nodes["parent"], np.int32),
            "token": np.array(nodes["token"], np.uint16),
            "count": np.array(nodes["count"], np.int32),
            "node": np.array(laws["node"], np.int32),
            "ids": np.concatenate(laws["ids"]),
            "probs": np.concatenate(laws["probs"]),
        }


def draws_of(tree, tokenizer):
    """The draws of a tree as {text: count}: leaves are the nodes that nobody names as parent, END adds no text."""
    inner, out = set(tree["parent"].tolist()), {}
    for leaf in range(len(tree["parent"])):
        if leaf in inner:
            continue
        tokens, at = [], leaf
        while at > 0:
            if tree["token"][at] != END:
                tokens.append(int(tree["token"][at]))
            at = int(tree["parent"][at])
        text = tokenizer.decode(tokens[::-1])
        out[text] = out.get(text, 0) + int(tree["count"][leaf])
    return out


def main():
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("--model", required=True)
    args.add_argument("--prompts", required=True)
    args.add_argument("--out", required=True)
    args.add_argument("--seed", type=int, default=0)
    args.add_argument("--threads", type=int, default=2)
    args.add_argument("--part", type=int, nargs=2, default=(0, 1), help="K N: of N processes the K-th")
    args = args.parse_args()
    torch.set_num_threads(args.threads)
    teacher, out = Teacher(args.model), Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in Path(args.prompts).read_text().splitlines()][args.part[0] :: args.part[1]]
    start, nodes, tokens = time.time(), 0, 0
    for n, row in enumerate(rows):
        path = out / f"{row['id']}.npz"
        if not path.exists():
            rng = np.random.default_rng([args.seed, *row["id"].encode()])
            tree = teacher.tree(row["text"], row["draws"], row["tokens"], rng)
            part = path.with_suffix(".part")
            with open(part, "wb") as file:
                np.savez(file, text=np.array(row["text"]), **tree)
            part.rename(path)
            nodes += len(tree["node"])
            tokens += int(tree["count"][1:].sum())
        if n % 20 == 0:
            s = time.time() - start
            print(
                f"{n + 1}/{len(rows)} prompts, {nodes} prefixes, {tokens} tokens, {nodes / s:.0f} prefixes/s, {tokens / s:.0f} tokens/s",
                flush=True,
            )


if __name__ == "__main__":
    main()
