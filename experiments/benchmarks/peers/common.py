"""What the scripts for torch share: flags, models, the clock and the last line.

A peer is measured as ours is: on one thread, in float32, by the CPU time of its process. Nothing is
read from a hub.
"""

import os

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "WANDB_DISABLED": "true"}

import argparse
import contextlib
import importlib.metadata
import json
import resource
import statistics
import sys
import tempfile
import time

PAD, EOS = 0, 1


def parser(about: str) -> argparse.ArgumentParser:
    """With the flags of a shape, named as those of `benchmark.py`."""
    flags = argparse.ArgumentParser(description=about)
    flags.add_argument("--family", default="gpt2", choices=["gpt2", "llama", "qwen2"])
    sizes = dict(hidden=256, layers=4, heads=4, vocab=8192, batch=16, repeats=5, warmup=1)
    for name, default in (sizes | dict(kv_heads=0, mlp=0)).items():
        flags.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    return flags


def add_numbers(flags: argparse.ArgumentParser, **numbers: int):
    for name, default in numbers.items():
        flags.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)


def one_thread(seed: int = 0):
    import torch

    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    torch.manual_seed(seed)


def model_config(args: argparse.Namespace, max_length: int):
    """The config of transformers, without dropout."""
    from transformers import GPT2Config, LlamaConfig, Qwen2Config

    tokens = dict(bos_token_id=EOS, eos_token_id=EOS, pad_token_id=PAD, num_labels=1)
    mlp = args.mlp or 4 * args.hidden
    if args.family == "gpt2":
        return GPT2Config(
            vocab_size=args.vocab,
            n_positions=max_length,
            n_embd=args.hidden,
            n_layer=args.layers,
            n_head=args.heads,
            n_inner=mlp,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **tokens,
        )
    return {"llama": LlamaConfig, "qwen2": Qwen2Config}[args.family](
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=mlp,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads or args.heads,
        max_position_embeddings=max_length,
        tie_word_embeddings=False,
        **tokens,
    )


def tokenizer(vocab_size: int):
    """One word for each token, as the trainers ask for a tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": PAD, "<eos>": EOS}
    words |= {f"w{i}": i for i in range(len(words), vocab_size)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(pad_token="<pad>", eos_token="<eos>", padding_side="left")
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def trainer_settings(folder: str) -> dict:
    """Those of every trainer: on the CPU, in float32, nothing computed twice, written or logged."""
    return dict(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        fp16=False,
        gradient_checkpointing=False,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        save_strategy="no",
        eval_strategy="no",
        weight_decay=0.0,
        max_grad_norm=1.0,
        dataloader_num_workers=0,
    )


@contextlib.contextmanager
def scratch():
    """A folder for what a trainer wants to write; what it prints goes to stderr."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        yield folder


class StepClock:
    """CPU and wall seconds of the optimizer steps of a trainer, without the making of batches."""

    def __init__(self):
        self.cpu, self.wall = [], []

    def callback(self):
        from transformers import TrainerCallback

        clock = self

        class Callback(TrainerCallback):
            def on_step_begin(self, args, state, control, **_):
                clock.start = time.process_time(), time.perf_counter()

            def on_step_end(self, args, state, control, **_):
                clock.cpu.append(time.process_time() - clock.start[0])
                clock.wall.append(time.perf_counter() - clock.start[1])

        return Callback()


class CountedBatches:
    """A collator that counts the tokens and the positions of what it collates."""

    def __init__(self, collate):
        self.collate, self.tokens, self.positions = collate, [], []

    def __call__(self, examples):
        batch = self.collate(examples)
        size = batch["input_ids"].numel()
        mask = batch.get("attention_mask")
        self.tokens.append(size if mask is None else int(mask.sum()))
        self.positions.append(size)
        return batch


def in_order(trainer):
    """Have a trainer take its examples in their order, so that batches are those of ours."""
    from torch.utils.data import SequentialSampler

    trainer._get_train_sampler = lambda *_: SequentialSampler(trainer.train_dataset)


def train(trainer) -> "CountedBatches":
    """Train on batches in their own order; returns what has counted them."""
    batches = trainer.data_collator = CountedBatches(trainer.data_collator)
    in_order(trainer)
    trainer.train()
    return batches


def stage_figures(clock: StepClock, batches: CountedBatches, warmup: int) -> dict:
    """Means over the steps after `warmup`."""
    steps = slice(warmup, len(clock.cpu))
    tokens, positions = sum(batches.tokens[steps]), sum(batches.positions[steps])
    count = len(clock.cpu[steps])
    return {
        "cpu_seconds_per_step": sum(clock.cpu[steps]) / count,
        "steps": count,
        "tokens_per_step": tokens / count,
        "share_of_positions_with_tokens": tokens / positions,
        "tokens_per_cpu_second": tokens / sum(clock.cpu[steps]),
        "tokens_per_second": tokens / sum(clock.wall[steps]),
    }


def call_figures(cpu: list[float], wall: list[float], suffix: str = "") -> dict:
    """Median and minimum of some calls."""
    return {
        f"cpu_seconds{suffix}": statistics.median(cpu),
        f"cpu_seconds{suffix}_min": min(cpu),
        f"wall_seconds{suffix}": statistics.median(wall),
    }


def print_report(benchmark: str, args: argparse.Namespace, packages: list[str], figures: dict):
    """One line of JSON; floats with four digits."""
    figures = {
        "benchmark": benchmark,
        "arguments": vars(args),
        **figures,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "load_average": os.getloadavg()[0],
        **{name: importlib.metadata.version(name) for name in packages},
    }
    rounded = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in figures.items()}
    print(json.dumps(rounded), flush=True)
