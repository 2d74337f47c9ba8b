"""Optimizer steps of TRL's RewardTrainer on random pairs of texts, padded; it does not pack."""

import common
from lengths import draw_texts


def main():
    flags = common.parser(__doc__)
    common.add_numbers(flags, texts=128, max_length=128)
    flags.add_argument("--lengths", default="fixed")
    args = flags.parse_args()
    common.one_thread()

    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    drawn = draw_texts(args.lengths, args.texts, args.max_length, args.vocab)
    texts = [text.tolist() for text in drawn]
    data = Dataset.from_dict({"chosen_ids": texts[0::2], "rejected_ids": texts[1::2]})
    config = common.model_config(args, args.max_length)
    model = AutoModelForSequenceClassification.from_config(config)
    clock = common.StepClock()
    with common.scratch() as folder:
        settings = RewardConfig(
            **common.trainer_settings(folder),
            per_device_train_batch_size=args.batch // 2,  # pairs
            num_train_epochs=args.warmup + args.repeats,
            learning_rate=1e-5,
            max_length=args.max_length,
        )
        trainer = RewardTrainer(
            model=model,
            args=settings,
            train_dataset=data,
            processing_class=common.tokenizer(args.vocab),
            callbacks=[clock.callback()],
        )
        batches = common.train(trainer)
    steps_an_epoch = -(-args.texts // args.batch)
    figures = common.stage_figures(clock, batches, args.warmup * steps_an_epoch)
    common.print_report("trl_reward", args, ["trl", "transformers", "torch"], figures)


if __name__ == "__main__":
    main()
