"""What the two comparisons share: the other implementation, and our program run as a user runs it.

The other implementation is Hugging Face transformers in F32 on PyTorch. A GGUF file reaches it
through the `gguf` package's reader and dequantizer, so nothing of the file, of the model or of the
tokenizer is read by code of Nibble.

Greedy decoding is compared with one forward pass over prompt + answer: if every token of the answer
is the most likely one after what stands before it, greedy decoding there gives the same answer.
After a first difference the remaining tokens can still be compared, those of two free runs not.
"""
import json
import os
import platform
import subprocess
import tempfile
from importlib import metadata

import torch

torch.set_num_threads(1)

# Of a log-probability. Both sides sum in F32 and in different orders: over SmolLM2's 30 layers the
# largest difference measured is 3.2e-5 (158 tokens).
TOLERANCE = 2e-4


def versions(*names):
    return ", ".join(f"{name} {metadata.version(name)}" for name in names if installed(name)) + \
        f", torch {torch.__version__}, Python {platform.python_version()}"


def installed(name):
    try:
        metadata.version(name)
        return True
    except metadata.PackageNotFoundError:
        return False


def load_model(path):
    """transformers' model of a Hugging Face directory or a GGUF file, weights widened to F32."""
    from transformers import AutoModelForCausalLM
    if os.path.isdir(path):
        return AutoModelForCausalLM.from_pretrained(path, torch_dtype=torch.float32).eval()
    from gguf import GGUFReader
    folder, name = os.path.split(os.path.abspath(path))
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, torch_dtype=torch.float32)
    # transformers 4.46 does not notice that a file without output.weight ties it to the embedding:
    # it would be left random, with a warning.
    if all(t.name != "output.weight" for t in GGUFReader(path).tensors):
        model.config.tie_word_embeddings = True
        model.tie_weights()
    return model.eval()


def load_tokenizer(path):
    """The `tokenizers` library on tokenizer.json, or on a GGUF file's vocabulary and merges.

    transformers' own conversion of a GGUF vocabulary forgets the pre-tokenizer, so it is put
    together here, as SmolLM2's tokenizer.json has it: single digits, then GPT-2's expression.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers
    if os.path.isdir(path):
        return tokenizers.Tokenizer.from_file(os.path.join(path, "tokenizer.json"))
    from gguf import GGUFReader
    reader = GGUFReader(path)

    def field(key):
        return reader.fields[key].contents()

    kind = (field("tokenizer.ggml.model"), field("tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise SystemExit(f"{path}: tokenizer {kind}; only gpt2 with pre-tokenizer smollm is known "
                         "here: export the model as a Hugging Face directory")
    vocabulary = {token: i for i, token in enumerate(field("tokenizer.ggml.tokens"))}
    merges = [tuple(merge.split(" ")) for merge in field("tokenizer.ggml.merges")]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def run_nibble(nibble, arguments):
    """Every JSON line that the program prints."""
    done = subprocess.run([nibble, *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"nibble {' '.join(arguments)} failed ({done.returncode}):\n{done.stderr}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def with_rows(key, texts, action):
    """action(path of a .jsonl file with one {key: text} a line)."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "rows.jsonl")
        with open(path, "w", encoding="utf-8") as out:
            for text in texts:
                out.write(json.dumps({key: text}) + "\n")
        return action(path)


def nibble_generate(nibble, model, prompts, tokens, threads, extra=()):
    """One {"text", "ids", "logprobs"} a prompt, greedy, F32."""
    answers = with_rows("prompt", prompts, lambda path: run_nibble(nibble, [
        "generate", "-m", model, "--prompts", path, "-n", str(tokens), "--json",
        "--compute", "f32", "-t", str(threads), *extra]))
    if len(answers) != len(prompts):
        raise SystemExit(f"nibble generate answered {len(answers)} of {len(prompts)} prompts")
    if not all(len(answer["ids"]) == len(answer["logprobs"]) > 0 for answer in answers):
        raise SystemExit("nibble generate: an answer without tokens, or without logprobs for them")
    return answers


def nibble_tokens(nibble, model, texts):
    """The ids of every text, without the end token that closes a training row."""
    rows = with_rows("text", texts, lambda path: run_nibble(nibble, [
        "tokens", "-m", model, "-d", path, "--format", "text", "--rows", str(len(texts)),
        "--json"]))
    if len(rows) != len(texts):
        raise SystemExit(f"nibble tokens gave {len(rows)} rows for {len(texts)} texts")
    ends = {row["ids"][-1] for row in rows}
    if len(ends) != 1:
        raise SystemExit(f"rows of format text end in different tokens: {sorted(ends)}")
    return [row["ids"][:-1] for row in rows]


def answer_logprobs(model, prompt_ids, answer_ids):
    """log p(. | everything before) at each answer token: [answer_ids, vocabulary], F64."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt_ids + answer_ids])).logits[0]
    return torch.log_softmax(logits[len(prompt_ids) - 1:-1].double(), dim=-1)


class Comparison:
    """Collects our answers against the other model's log-probabilities, and reports.

    The token that ends an answer is among its ids and is compared like the others.
    """

    def __init__(self):
        self.differences = []
        self.margins = []  # between the other model's best and second best token
        self.diverged = []

    def add(self, label, answer, logprobs):
        """Compares one answer; returns the line that says how it went."""
        ids = torch.tensor(answer["ids"], dtype=torch.long)
        theirs = logprobs.gather(1, ids[:, None])[:, 0]
        differences = (theirs - torch.tensor(answer["logprobs"]).double()).abs()
        best = logprobs.topk(2, dim=-1)
        self.differences += differences.tolist()
        self.margins += (best.values[:, 0] - best.values[:, 1]).tolist()
        same = best.indices[:, 0] == ids
        line = (f"{label}: {int(same.sum())} of {len(ids)} tokens are the most likely, |d logprob| "
                f"max {differences.max():.2e} mean {differences.mean():.2e}")
        for i in (~same).nonzero()[:, 0].tolist():
            gap = float(best.values[i, 0] - theirs[i])
            self.diverged.append(gap)
            line += (f"\n  token {i}: nibble {int(ids[i])}, transformers "
                     f"{int(best.indices[i, 0])}, which it holds {gap:.2e} more likely")
        return line

    def passed(self):
        # A greedy choice may differ only where both tokens are as likely as the arithmetic can say.
        return bool(self.differences) and max(self.differences) <= TOLERANCE and \
            all(gap <= 2 * TOLERANCE for gap in self.diverged)

    def summary(self):
        count = len(self.differences)
        return (f"{count} tokens, greedy choice identical at {count - len(self.diverged)}; "
                f"|d logprob| max {max(self.differences):.3e}, mean "
                f"{sum(self.differences) / count:.3e} (tolerance {TOLERANCE:.0e}); smallest margin "
                f"between best and second token {min(self.margins):.2e}")
