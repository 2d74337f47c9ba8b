"""Tokens a second of transformers' `generate`, with its cache, of a random model."""

import time

import common


def main():
    flags = common.parser(__doc__)
    common.add_numbers(flags, prompt_len=32, response_len=64)
    args = flags.parse_args()
    common.one_thread()

    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    config = common.model_config(args, args.prompt_len + args.response_len)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.eos_token_id = None  # responses of full length
    prompts = torch.randint(2, args.vocab, (args.batch, args.prompt_len))
    how = GenerationConfig(
        max_new_tokens=args.response_len,
        min_new_tokens=args.response_len,
        do_sample=True,
        temperature=0.7,
        top_k=0,
        top_p=1.0,
        pad_token_id=common.PAD,
    )
    cpu, wall = [], []
    for _ in range(args.warmup + args.repeats):
        start = time.process_time(), time.perf_counter()
        with torch.no_grad():
            mask = torch.ones_like(prompts)
            texts = model.generate(prompts, attention_mask=mask, generation_config=how)
        cpu.append(time.process_time() - start[0])
        wall.append(time.perf_counter() - start[1])
        if texts.shape[1] != args.prompt_len + args.response_len:
            raise RuntimeError(f"responses are not of full length: {tuple(texts.shape)}")
    figures = common.call_figures(cpu[args.warmup :], wall[args.warmup :])
    tokens = args.batch * args.response_len
    figures["rollout_tokens_per_cpu_second"] = tokens / figures["cpu_seconds"]
    common.print_report("hf_generate", args, ["transformers", "torch"], figures)


if __name__ == "__main__":
    main()
