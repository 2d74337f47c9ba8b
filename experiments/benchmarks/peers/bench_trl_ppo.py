"""Iterations of TRL's PPOTrainer: rollout, scores and updates of four random models of one size.

Two things of it are changed, both in its favour or needed to compare: it collects garbage twice an
iteration, which costs some tenths of a second whatever the size (`--collect-garbage` leaves it so),
and where a batch falls into minibatches it would take one optimizer step for all of them, as each
counts as a part of an accumulated one.
"""

import time

import common


def make_trainer(args, settings, marks):
    """TRL's trainer of four random models; each iteration adds (CPU, wall) seconds to `marks`."""
    import numpy as np
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        DataCollatorWithPadding,
        TrainerCallback,
    )
    from trl.experimental.ppo import PPOTrainer

    def model(kind):
        return kind.from_config(common.model_config(args, args.prompt_len + args.response_len))

    class Marks(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            marks.append((time.process_time(), time.perf_counter()))

    policy, reference = (model(AutoModelForCausalLM) for _ in range(2))
    reference.load_state_dict(policy.state_dict())
    critic, reward = (model(AutoModelForSequenceClassification) for _ in range(2))
    words, shape = common.tokenizer(args.vocab), (4 * args.batch, args.prompt_len)
    prompts = np.random.default_rng(0).integers(2, args.vocab, size=shape)
    trainer = PPOTrainer(
        args=settings,
        processing_class=words,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=critic,
        train_dataset=Dataset.from_dict({"input_ids": prompts.tolist()}),
        data_collator=DataCollatorWithPadding(words),
        callbacks=[Marks()],
    )
    policy.generation_config.eos_token_id = None  # responses of full length
    policy.generation_config.pad_token_id = common.PAD
    trainer.accelerator.gradient_accumulation_steps = 1
    return trainer


def main():
    flags = common.parser(__doc__)
    common.add_numbers(flags, prompt_len=32, response_len=64, num_epochs=4, num_minibatches=1)
    flags.add_argument("--collect-garbage", action="store_true")
    args = flags.parse_args()
    common.one_thread()

    from trl.experimental.ppo import PPOConfig, ppo_trainer

    iterations, marks = args.warmup + args.repeats, []
    if not args.collect_garbage:
        ppo_trainer.gc = type("NoCollection", (), {"collect": staticmethod(lambda *_: 0)})
    with common.scratch() as folder:
        settings = PPOConfig(
            **common.trainer_settings(folder),
            per_device_train_batch_size=args.batch // args.num_minibatches,
            gradient_accumulation_steps=args.num_minibatches,
            num_mini_batches=args.num_minibatches,
            num_ppo_epochs=args.num_epochs,
            total_episodes=iterations * args.batch,
            local_rollout_forward_batch_size=args.batch,
            response_length=args.response_len,
            num_sample_generations=0,
            stop_token=None,
            temperature=0.7,
            learning_rate=3e-6,
        )
        trainer = make_trainer(args, settings, marks)
        inner, taken = trainer.optimizer.optimizer, []
        step = inner.step
        inner.step = lambda *given, **named: (taken.append(1), step(*given, **named))[1]
        trainer.train()
    wanted = iterations * args.num_epochs * args.num_minibatches
    if len(taken) != wanted:
        raise RuntimeError(f"{wanted} optimizer steps were asked for, {len(taken)} were taken")
    pairs = list(zip(marks[args.warmup - 1 : -1], marks[args.warmup :], strict=True))
    cpu, wall = ([after[i] - before[i] for before, after in pairs] for i in (0, 1))
    figures = common.call_figures(cpu, wall, "_per_iter")
    common.print_report("trl_ppo", args, ["trl", "transformers", "torch"], figures)


if __name__ == "__main__":
    main()
