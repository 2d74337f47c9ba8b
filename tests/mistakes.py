"""Mistakes in flags and settings: what follows a script's good flags, and the line it ends with.

In a line `...` stands for anything, and `{tmp}`, `{base}` ... for the places of `broken.Places`.
"""

FLAGS = """
rlhf without --config
    flag --config=None: Flag --config must have a value other than None.; --help lists the flags
train_sft without --config
    --config=FILE.py must be given before --config.model.path; --help lists the flags
train_sft without --workdir
    flag --workdir=None: Flag --workdir must have a value other than None.; --help lists the flags
train_sft --wrkdir=a
    Unknown command line flag 'wrkdir'. Did you mean: workdir ?; --help lists the flags
train_sft more
    unexpected arguments ['more']; --help lists the flags
train_sft --config={tmp}/none.py
    --config must be a config file, got '{tmp}/none.py', which is not there; --help lists the flags
train_sft --config={root}/configs/sft.py:nonsense
    unknown variant 'nonsense'; choose from ['default', 'scratch']; --help lists the flags
train_reward --config={root}/configs/reward.py:tiny
    this config file has no variants: leave out the colon and what follows it; ...
train_sft --config.sft.batchsize=3
    unknown setting sft.batchsize; did you mean 'batch_size'?; --help lists the flags
train_sft --config.ppo.kl_coef=0.1
    ppo.kl_coef cannot be set: the config has no section ppo; --help lists the flags
train_sft --config.sft=3
    sft must be set field by field, --config.sft.data=..., got '3'; --help lists the flags
train_sft --config.sft.data.path=a.jsonl
    sft.data is a setting and has no fields, got sft.data.path; --help lists the flags
train_sft --config.sft.batch_size=many
    sft.batch_size must be a whole number, got 'many'; --help lists the flags
train_sft --config.sft.batch_size=0.5
    sft.batch_size must be a whole number, got '0.5'; --help lists the flags
train_sft --config.sft.num_epochs=all
    sft.num_epochs must be a number, got 'all'; --help lists the flags
train_sft --config.model.scan_layers=maybe
    model.scan_layers must be True or False, got 'maybe'; --help lists the flags
generate without --prompt
    give --prompt, or --prompts and --out, or --interactive
generate without --model
    give either --model, or --workdir and --stage
generate --stage=reward
    flag --stage=reward: value should be one of <sft|ppo>; --help lists the flags
generate --top_p=0
    flag --top_p=0: 0.0 is not a number in the range [1e-06, 1.0]; --help lists the flags
generate --temperature=-1
    flag --temperature=-1: -1.0 is not a non-negative number; --help lists the flags
generate --prompt=
    prompt 0 has 0 tokens, allowed are 1 to 46: ''
generate --model={reward}
    model must be a policy to generate text, got a reward model
"""

SETTINGS = """
train_sft --config.seed=-1
    seed must be >= 0, got -1
train_sft --config.model.dtype=int8
    model.dtype must be one of ['float32', 'bfloat16', 'float16'], got 'int8'
train_sft --config.sft.batch_size=0
    sft.batch_size must be > 0, got 0
train_sft --config.sft.num_epochs=nan
    sft.num_epochs must be a finite number, got nan
train_sft --config.sft.validation_fraction=1
    sft.validation_fraction must be in (0, 1), got 1.0
train_sft --config.sft.trainable=top
    sft.trainable must be 'all', 'head' or a number of top layers >= 1, got 'top'
train_sft --config.sft.trainable=3
    sft.trainable must be at most 2, the model's layers, got 3
train_sft --config.sft.trainable=head
    sft.trainable must be 'all' or a number of top layers for a model that ties ..., got 'head'
train_sft --config.sft.num_micro_batches=5
    sft.batch_size must be a multiple of num_micro_batches (5), got 8
train_sft --config.sft.batch_size=64
    sft.batch_size must be at most 4..., the texts to train on, got 64
train_sft --config.sft.max_length=2
    ...max_length=2 tokens leaves no text of 4...: the shortest has ...
train_sft --config.sft.validation_fraction=0.001
    {texts}: its 48 records leave none for validation with ...=0.001; ...
train_sft --config.sft.data={tmp}
    sft.data must be a file, got '{tmp}', which is a folder
train_sft --config.sft.optimizer.schedule=step
    sft.optimizer.schedule must be one of ['constant', 'linear', 'cosine'], got 'step'
train_sft --config={root}/configs/sft.py:scratch --config.model.scratch.vocab_size=256
    model.scratch.vocab_size must be >= 300, got 256
train_reward --config.reward.format=pairs
    reward.format must be one of ['preferences', 'ratings'], got 'pairs'
train_reward --config.reward.batch_size=7
    reward.batch_size must be even (pairs), got 7
train_reward --config.reward.init_from=sft
    reward.init_from='sft' needs the stage sft, but it has not begun: give the config ...
train_ppo --config.ppo.clip_range=2
    ppo.clip_range must be in (0, 1), got 2.0
train_ppo --config.ppo.num_minibatches=3
    ppo.rollout_batch_size must be a multiple of num_minibatches x ... (3), got 64
train_ppo --config.ppo.reward_model=
    ppo needs either a reward_model or a reward_function, got reward_model='' and ...=''
train_ppo --config.ppo.reward_model={sft}
    ppo.reward_model must be a reward model, got the policy '{sft}'
train_ppo --config.ppo.reward_model={base}
    ppo.reward_model must be a stage or its folder, got '{base}'
train_ppo --config.ppo.init_from={reward}
    ppo.init_from must be a policy, got '{reward}', which scores texts
train_ppo --config.ppo.response_length=25
    ppo.max_prompt_length + ppo.response_length must be at most 48 (...), got 24 + 25
train_ppo --config.ppo.max_prompt_length=1
    {data}/prompts.jsonl: ...; see ppo.max_prompt_length
train_ppo --config.ppo.stop_tokens=<none>
    ...stop tokens must be in the tokenizer's vocabulary, got ['<none>']
train_ppo --config.ppo.reward_model= --config.ppo.reward_function=nothing:here
    ppo.reward_function must be 'module:function', got 'nothing:here': No module named 'nothing'
train_ppo --config.ppo.reward_model= --config.ppo.reward_function=math:pi
    ppo.reward_function must name a function, got 'math:pi', which is 3.14...
train_ppo --config.model.path={sft}
    model.path must be a model, got the stage folder '{sft}': name it as reward.init_from ...
train_ppo --config.model.path={tmp}/none
    there is no folder or .gguf file {tmp}/none
train_ppo --config.model.path=package:none
    unknown model 'package:none'; choose from ['smollm2-135m-instruct']
"""

CONFIGS = r"""
rlhf # code def get_config(:
    {tmp}/config.py:1: invalid syntax; --help lists the flags
rlhf # code def get_config():\n    return nothing
    {tmp}/config.py:2: name 'nothing' is not defined; --help lists the flags
rlhf # code import nothing_at_all
    {tmp}/config.py:1: No module named 'nothing_at_all'; --help lists the flags
rlhf # code settings = 1
    the config file must have a function get_config; --help lists the flags
rlhf # code def get_config():\n    return {}
    get_config() of {tmp}/config.py must return a ConfigDict, got a dict
rlhf # config {"sed": 1}
    unknown setting sed; did you mean 'seed'?
rlhf # config {"ppo": {"kl_coeff": 0.1}}
    unknown setting ppo.kl_coeff; did you mean 'kl_coef'?
rlhf # config {"sft": {"batch_size": "8"}}
    sft.batch_size must be a whole number, got '8'
rlhf # config {"sft": {"data": ["a.jsonl"]}}
    sft.data must be a text, got ['a.jsonl']
rlhf # config {"model": None}
    model must be given
rlhf # config {"model": {"path": ""}}
    model needs either a path or a scratch section, got path='' and scratch=None
rlhf # config {"ppo": None}
    evaluate needs a ppo section, whose responses it judges, got none
rlhf # config {"evaluate": {"judges": "tests.tiny_run:none"}}
    evaluate.judges must be 'module:function', got 'tests.tiny_run:none': ...'none'
rlhf # config {"evaluate": {"ratings": "none.jsonl"}}
    evaluate.ratings must be a file, got 'none.jsonl', which is not there
rlhf # config {"evaluate": {"num_prompts": 7}}
    evaluate.num_prompts must be at most the 6 prompts of {data}/test_prompts.jsonl, got 7
rlhf # config {"sft": None, "reward": None, "ppo": None, "evaluate": None}
    the config has none of the sections ['sft', 'reward', 'ppo', 'evaluate']
"""

DATA = r"""
train_sft --config.sft.data={lines} # lines
    {lines}: the file is empty, at least one line is needed
train_sft --config.sft.data={lines} # lines {"text": "a"}\n{"text": "b"\n
    {lines}:2: not a JSON object on one line: ...
train_sft --config.sft.data={lines} # lines {"text": "a"}\n\n["text"]\n
    {lines}:3: a line must be a JSON object {...}, got ['text']
train_sft --config.sft.data={lines} # lines {"text": "a", "text": "b"}
    {lines}:1: not a JSON object on one line: a key stands twice in ['text', 'text']
train_sft --config.sft.data={lines} # lines {"body": "a"}
    {lines}:1: the keys must be ['text'] or ['prompt', 'completion']..., got ['body']
train_sft --config.sft.data={lines} # lines {"text": 7}
    {lines}:1: text must be a string, got 7
train_sft --config.sft.data={lines} --config.sft.validation_data={lines} # lines {"text": " "}
    ...none of the 1 records can be used: 1 blank
train_sft --config.sft.data={lines} # lines {"messages": []}
    {lines}:1: messages must be a list of messages, got []
train_sft --config.sft.data={lines} # lines {"messages": [{"role": "user"}]}
    {lines}:1: messages[0] must have role and content, got {'role': 'user'}
train_sft --config.sft.data={lines} # lines {"messages": [{"role": "robot", "content": "a"}]}
    {lines}:1: the role of messages[0] must be one of ['system', ...], got 'robot'
train_sft --config.sft.data={lines} # lines {"messages": [{"role": "user", "content": "a"}]}
    {lines}:1: messages must have a turn of the assistant's to learn
train_sft --config.sft.data={lines} # lines {"text": "\ud800"}
    {lines}:1: text must be valid Unicode, got '...ud800'
train_sft --config.sft.data={lines} # lines {"text": "café, but not in UTF-8"}
    {lines}:1: not a JSON object on one line: ...
train_reward --config.reward.data={lines} # lines {"chosen": "a", "rejected": "b"}
    {lines}:1: without a prompt, chosen and rejected must be ..., got 'a' and 'b'
train_reward --config.reward.data={lines} # lines {"prompt": "a", "responses": ["b"]}
    {lines}:1: responses must be a list of two or more, got ['b']
train_reward --config.reward.data={lines} # lines {"prompt":"","responses":["a","b"],"scores":[1]}
    {lines}:1: scores must be a list of 2 numbers, one for each of the responses, got [1]
train_reward --config.reward.data={lines}.gz # lines.gz not gzipped
    {lines}.gz:1: the gzip file is damaged: ...
train_reward --config.reward.data={lines}.parquet # lines.parquet not a table
    {lines}.parquet: not a Parquet file: ...
train_ppo --config.ppo.prompts=hub:nowhere
    a hub's data set must be hub:owner/name or hub:owner/name:split, got 'hub:nowhere'
train_reward --config.reward.data={lines} # lines {"prompt": "", "chosen": 1, "rejected": "b"}
    {lines}:1: chosen must be a string or a list of messages, got 1
train_reward --config.reward.format=ratings --config.reward.data={lines} # lines {"text": "a"}
    {lines}:1: the keys must be ['text', 'rating'] or ['text', 'ratings'], got ['text']
train_reward --config.reward.format=ratings --config.reward.data={lines} # ratings []
    {lines}:1: ratings must be a list of numbers, not empty, got []
train_reward --config.reward.format=ratings --config.reward.data={lines} # ratings [1, NaN]
    {lines}:1: a rating must be a finite number up to 1e30, got nan
train_ppo --config.ppo.prompts={lines} # lines {"text": "a"}
    {lines}:1: the keys must be ['prompt']..., got ['text']
train_ppo --config.ppo.prompts={lines} # lines {"prompt": ["a"]}
    {lines}:1: prompt[0] must have role and content, got 'a'
train_ppo --config.ppo.prompts={lines} # lines {"prompt": ""}
    {lines}: none of the 1 records can be used: 1 blank...
"""

MODELS = """
train_sft --config.model.path={model} # no config.json
    {model} has no config.json
train_sft --config.model.path={model} # torn config.json
    {model}/config.json is not JSON: ...
train_sft --config.model.path={model} # config.json {"model_type": "mamba"}
    {model}: model_type 'mamba' is not supported; choose from [...]
train_sft --config.model.path={model} # config.json {"hidden_act": "gelu"}
    {model}: hidden_act='gelu' is not supported for llama; only 'silu' is
train_sft --config.model.path={model} # config.json {"num_local_experts": 8}
    {model}: num_local_experts=8 is not supported for llama
train_sft --config.model.path={model} # config.json {"auto_map": {"a": "b"}}
    {model}: auto_map asks for code from the checkpoint, which is never run here
train_sft --config.model.path={model} # config.json {"intermediate_size": None}
    {model}: config.json has no 'intermediate_size'
train_sft --config.model.path={model} # config.json {"hidden_size": 33}
    {model}: hidden_size (33) must be a multiple of num_attention_heads (2)
train_sft --config.model.path={model} # config.json {"hidden_size": "32"}
    {model}: config.json cannot be read: TypeError('not all arguments converted ...')
train_sft --config.model.path={model} # no model.safetensors
    {model} has no model.safetensors. To convert a model that you trust, ...
train_sft --config.model.path={model} # pickled weights
    {model} has no model.safetensors, only ['pytorch_model.bin'], and pickled weights ...
train_sft --config.model.path={model} # a shard is missing
    {model}: model.safetensors.index.json names ['2.safetensors'], which are not there
train_sft --config.model.path={model} # weights without a norm
    {model}: the weight files lack 1 tensors: model.norm.weight
train_sft --config.model.path={model} # weights with more
    {model}: the weight files hold 1 tensors that the model of config.json does not ...: model.more
train_sft --config.model.path={model} # torn model.safetensors
    {model}/model.safetensors is damaged: ...
train_sft --config.model.path={model} # torn tokenizer.json
    {model}: the tokenizer cannot be read: JSONDecodeError(...)
train_sft --config.model.path={model} # no tokenizer.json
    {model} has no tokenizer.json. To convert an older form: ...
train_sft --config.model.path={model} # no end of sequence
    {model}: the tokenizer has no end-of-sequence token; name one as eos_token in ...
train_sft --config.model.path={model} # config.json {"vocab_size": 100}
    {model}: the tokenizer has ... tokens, the model 100
train_sft --config.model.path={lines} # lines
    {lines} is neither a folder nor a .gguf file
train_sft --config.model.path={tmp}/model.gguf # no GGUF
    {tmp}/model.gguf is not a readable GGUF file: ...
train_sft --config.model.path={tmp}/model.gguf # GGUF of another architecture
    {tmp}/model.gguf: GGUF architecture 'mamba' is not supported; only 'llama' is
train_sft --config.model.path={tmp}/model.gguf # GGUF without metadata
    {tmp}/model.gguf: its metadata lack ['llama.block_count', ...]
"""

WORKDIRS = """
train_sft --workdir=
    workdir must be a folder, or not there yet, got ''
train_sft # a file as workdir
    workdir must be a folder, or not there yet, got '{tmp}/run'
train_sft --workdir={tmp}/run/inside # a file as workdir
    the workdir {tmp}/run/inside cannot be made: Not a directory
train_sft --config.sft.batch_size=4 # a finished run
    {tmp}/run/sft was begun with other settings: batch_size: 8 -> 4. Set them back, or ...
train_sft --config.seed=1 # a finished run
    {tmp}/run/sft was begun with other settings: seed: 0 -> 1. Set them back, or ...
train_sft # a finished run with a torn config.json
    {tmp}/run/config.json must be a JSON object with a config: ...
train_sft # a finished run with a torn results.json
    {tmp}/run/results.json is not JSON: ...
train_sft # a finished run with a torn metrics.jsonl
    {tmp}/run/metrics.jsonl:1 is not JSON: ...
train_sft # a finished run with a torn sft/stage.json
    {tmp}/run/sft/stage.json is not JSON: ...
train_sft # a finished run with an empty sft/stage.json
    {tmp}/run/sft/stage.json must be as a stage writes it, but lacks ['frozen', ...]
train_reward --config.reward.init_from={tmp}/half # half a stage
    reward.init_from='{tmp}/half' is not complete: it has 1 of 99 steps
train_ppo --config.ppo.reward_model= --config.ppo.reward_function=slipped:score # a slip in a module
    ppo.reward_function must be 'module:function', got 'slipped:score': ... (slipped.py, line 1)
"""

# Told by what is read after the first checks: config.json and results.json are there, and whole.
LATE = """
train_sft --config.model.path={model} # weights of another shape
    ...model.norm.weight has shape (3,), but config.json asks for (32,)
train_sft --config.model.path={model} # weights as integers
    ...model.norm.weight is stored as int8; choose from ['float32', 'float16', 'bfloat16']
train_sft --config.model.path={base} --config.model.vocabulary_data={data}/prompts.jsonl
    {data}/prompts.jsonl:1: the keys must be ..., got ['prompt']
train_sft --config.model.path={model} --config.model.vocabulary_data={texts} # words
    model.vocabulary_data must be '' for {model}: only a BPE ..., this one is WordLevel
train_sft --config.model.path={model} --config.model.vocabulary_data={texts} # torn tokenizer.json
    {model}: the tokenizer cannot be read: JSONDecodeError(...)
"""
