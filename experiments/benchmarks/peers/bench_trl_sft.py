"""Optimizer steps of TRL's SFTTrainer on random texts, padded or packed ("bfd")."""

import common
from lengths import draw_texts


def main():
    flags = common.parser(__doc__)
    common.add_numbers(flags, texts=128, max_length=128)
    flags.add_argument("--lengths", default="fixed")
    flags.add_argument("--packing", action="store_true")
    flags.add_argument("--loss", default="nll", choices=["nll", "chunked_nll"])
    args = flags.parse_args()
    common.one_thread()

    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer
    from trl.data_utils import pack_dataset

    texts = draw_texts(args.lengths, args.texts, args.max_length, args.vocab)
    data = Dataset.from_dict({"input_ids": [text.tolist() for text in texts]})
    rows_a_step, num_rows = args.batch, args.texts
    if args.packing:  # so many rows that a step learns as many texts
        num_rows = len(pack_dataset(data, args.max_length, "bfd"))
        rows_a_step = max(1, round(args.batch * num_rows / args.texts))
    model = AutoModelForCausalLM.from_config(common.model_config(args, args.max_length))
    clock = common.StepClock()
    with common.scratch() as folder:
        settings = SFTConfig(
            **common.trainer_settings(folder),
            per_device_train_batch_size=rows_a_step,
            num_train_epochs=args.warmup + args.repeats,
            learning_rate=1e-5,
            max_length=args.max_length,
            packing=args.packing,
            loss_type=args.loss,
        )
        trainer = SFTTrainer(
            model=model,
            args=settings,
            train_dataset=data,
            processing_class=common.tokenizer(args.vocab),
            callbacks=[clock.callback()],
        )
        batches = common.train(trainer)
    steps_an_epoch = -(-num_rows // rows_a_step)
    figures = common.stage_figures(clock, batches, args.warmup * steps_an_epoch)
    common.print_report("trl_sft", args, ["trl", "transformers", "torch"], figures)


if __name__ == "__main__":
    main()
