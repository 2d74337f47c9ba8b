"""Mistakes in flags and settings: what follows a script's good flags, and the line it ends with.

In a line `...` stands for anything, and `{tmp}`, `{base}` ... for the places of `broken.Places`.
"""

FLAGS = """
rlhf without --config
    --config is missing (--help lists the flags)
train_sft without --config
    --config=FILE.py must be given before --config.model.path (--help lists the flags)
train_sft without --workdir
    --workdir is missing (--help lists the flags)
train_sft --wrkdir=a
    Unknown command line flag 'wrkdir'. Did you mean: workdir ? (--help lists the flags)
train_sft more
    unexpected arguments ['more'] (--help lists the flags)
train_sft --config={tmp}/none.py
    --config must be a config file, got '{tmp}/none.py', which is not there (--help lists the flags)
train_sft --config={root}/configs/sft.py:nonsense
    unknown variant 'nonsense'; choose from ['default', 'scratch'] (--help lists the flags)
rlhf --config={root}/configs/verifiable.py:tiny
    unknown variant 'tiny'; choose from ['acting', 'reasoning'] (--help lists the flags)
train_reward --config={root}/configs/reward.py:tiny
    unknown variant 'tiny'; choose from ['default', 'scratch'] (--help lists the flags)
train_sft --config.sft.batchsize=3
    unknown setting sft.batchsize; did you mean 'sft.batch_size'? (--help lists the flags)
train_sft --config.ppo.kl_coef=0.1
    ppo.kl_coef cannot be set: the config has no section ppo (--help lists the flags)
train_sft --config.sft=3
    sft must be set field by field, --config.sft.data=..., got '3' (--help lists the flags)
train_sft --config.sft.data.path=a.jsonl
    sft.data is a setting and has no fields, got sft.data.path (--help lists the flags)
train_sft --config.sft.batch_size=many
    sft.batch_size must be a whole number, got 'many' (--help lists the flags)
train_sft --config.sft.batch_size=0.5
    sft.batch_size must be a whole number, got '0.5' (--help lists the flags)
train_sft --config.sft.num_epochs=all
    sft.num_epochs must be a number, got 'all' (--help lists the flags)
train_sft --config.model.scan_layers=maybe
    model.scan_layers must be True or False, got 'maybe' (--help lists the flags)
generate without --prompt
    give --prompt, or --prompts and --out, or --interactive
generate without --model
    give either --model, or --workdir and --stage
generate --stage=reward
    flag --stage=reward: value should be one of <sft|ppo> (--help lists the flags)
generate --top_p=0
    flag --top_p=0: 0.0 is not a number in the range [1e-06, 1.0] (--help lists the flags)
generate --temperature=-1
    flag --temperature=-1: -1.0 is not a non-negative number (--help lists the flags)
generate --temperature=nan
    temperature must be a finite number, got nan
generate --temperature=1e39
    temperature must be at most 3.4e+38, got 1e+39
generate --top_k=99999999999
    top_k must be at most 2,147,483,647, got 99999999999
generate --response_length=9999999999
    response_length must be at most 2,147,483,647, got 9999999999
generate --seed=99999999999999999999
    flag --seed=99999999999999999999: ... [-9223372036854775806, 9223372036854775806] ...
generate --num_responses=99999999999
    flag --num_responses=99999999999: ... [1, 1000000] (--help lists the flags)
train_sft --flagfile={tmp}/none
    Unable to open flagfile: [Errno 2] No such file or directory: '{tmp}/none' (--help ...
train_sft --flagfile={tmp}
    Unable to open flagfile: [Errno 21] Is a directory: '{tmp}' (--help lists the flags)
train_sft --flagfile
    --flagfile with no argument (--help lists the flags)
train_sft --config.seed=99999999999999999999
    seed must be at most 9,223,372,036,854,775,806, got 99999999999999999999
train_sft --config.sft.num_epochs=1e30
    sft.num_epochs must give at most 2,147,483,647 steps, got 1e+30 passes over 47 rows
train_sft --config.sft.batch_size=99999999999
    sft.batch_size must be at most 2,147,483,647, got 99999999999
train_sft --config.sft.optimizer.learning_rate=1e300
    sft.optimizer.learning_rate must be at most 3.4e+38, got 1e+300
train_ppo --config.ppo.num_iterations=99999999999999999999999999
    ppo.num_iterations must be at most 2,147,483,647, got 99999999999999999999999999
train_sft --workdir={long}
    [Errno 36] File name too long: 'aaaa...aaaa'
train_sft --config.sft.data={long}
    [Errno 36] File name too long: 'aaaa...aaaa'
train_sft --config.model.path={long}
    ...
generate --model={long}
    ...
generate --prompt=
    --prompt is empty
generate without --model --workdir={tmp}/none --stage=ppo
    there is no run {tmp}/none
generate without --model --workdir={sft}/.. --stage=ppo
    {sft}/.. has no stage ppo; it has sft
generate without --model --workdir={data} --stage=sft
    {data} has no stage sft; it has none
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
    sft.trainable must be 'all', 'head', 'lora' or a number of top layers >= 1, got 'top'
train_sft --config.sft.trainable=3
    sft.trainable must be at most 2, the model's layers, got 3
train_sft --config.sft.trainable=head
    sft.trainable must be 'all', 'lora' or a number of ... for a model that ties ..., got 'head'
train_sft --config.sft.trainable=lora --config.sft.lora.targets=('query','c_attn')
    sft.lora.targets must be some of ['query', 'key', ...], each once, got ('query', 'c_attn')
train_sft --config.sft.lora.rank=8
    sft.lora.rank must be 16 unless sft.trainable is 'lora', got 8
train_sft --config.sft.trainable=lora --config.sft.lora.rank=1600
    sft.lora.rank must be at most 32, the model's width, got 1600
train_sft --config.sft.num_micro_batches=5
    sft.batch_size must be a multiple of num_micro_batches (5), got 8
train_sft --config.sft.batch_size=64
    sft.batch_size must be at most 4..., the texts to train on, got 64
train_sft --config.sft.max_length=2
    sft.data: {texts}: none of the 4... too long (over 2 tokens), ... has ...; see sft.max_length
train_reward --config.reward.max_length=2
    reward.data: {data}/preferences.jsonl: none of the ... too long (...; see reward.max_length
train_sft --config.sft.validation_fraction=0.001
    {texts}: its 48 records leave none for validation with ...=0.001; ...
train_sft --config.sft.data={tmp}
    sft.data must be a file, got '{tmp}', which is a folder
train_sft --config.sft.optimizer.schedule=step
    sft.optimizer.schedule must be one of ['constant', 'linear', 'cosine'], got 'step'
train_sft --config={root}/configs/sft.py:scratch --config.model.scratch.vocab_size=256
    model.scratch.vocab_size must be >= 300, got 256
train_sft --config={root}/configs/sft.py:scratch --config.model.path= --config.sft.trainable=12
    sft.trainable must be at most 6, the model's layers, got 12
train_reward --config.reward.format=pairs
    reward.format must be one of ['preferences', 'ratings'], got 'pairs'
train_reward --config.reward.batch_size=7
    reward.batch_size must be a multiple of 2, the most responses to a prompt of ..., got 7
train_reward --config.reward.init_from=sft
    reward.init_from='sft' needs the stage sft, but it has not begun: give the config ...
train_ppo --config.ppo.clip_range=2
    ppo.clip_range must be in (0, 1], or inf, got 2.0
train_ppo --config.ppo.num_minibatches=3
    ppo.rollout_batch_size must be a multiple of num_minibatches x ... (3), got 64
train_ppo --config.ppo.reward_model=
    ppo needs either a reward_model or a reward_function, got reward_model='' and ...=''
train_ppo --config.ppo.reward_model={sft}
    ppo.reward_model must be a reward model, got the policy '{sft}'
train_ppo --config.ppo.reward_model={base}
    ppo.reward_model must be a reward model, got the policy '{base}'
train_ppo --config.ppo.init_from={reward}
    ppo.init_from must be a policy, got '{reward}', which scores texts
train_ppo --config.ppo.response_length=25
    ppo.max_prompt_length + ppo.response_length must be at most 48 (...), got 24 + 25
train_ppo --config.ppo.max_prompt_length=1
    ppo.prompts: {data}/prompts.jsonl: none of the 6 records can ...; see ppo.max_prompt_length
train_ppo --config.ppo.reward_model= --config.ppo.reward_function=nothing:here
    ppo.reward_function must be 'module:function', got 'nothing:here': No module ..., neither ...
train_ppo --config.ppo.reward_model= --config.ppo.reward_function=tests/support/tiny_run.py:letters
    ppo.reward_function must be 'module:function', got ..., e.g. tests.support.tiny_run:letters
train_ppo --config.ppo.reward_model= --config.ppo.reward_function=tests.support.tiny_run.letters
    ppo.reward_function must be 'module:function', got ..., e.g. tests.support.tiny_run:letters
train_ppo --config.ppo.reward_model= --config.ppo.reward_function=tests.support.tiny_run:prepare
    ppo.reward_function must be a function (prompts: list[str], ...) ..., got ... with (folder): ...
train_ppo --config.ppo.reward_model= --config.ppo.reward_function=..:x
    ppo.reward_function must be 'module:function', got '..:x': the name of the module must not ...
train_ppo --config.ppo.reward_model= --config.ppo.reward_functions=('math:sin','math:sin')
    ppo.reward_functions must be names, each once, got ('math:sin', 'math:sin')
train_ppo --config.ppo.reward_functions=('math:sin',)
    ppo needs either a reward_model or a reward_function, got reward_model='...' ...=('math:sin',)
train_ppo --config.ppo.reward_model= --config.ppo.reward_function=math:sin
    ppo.reward_function must be a function (prompts: list[str], ...) ..., got math:sin with ...
train_ppo --config.ppo.reward_model= --config.ppo.reward_function=tests.support.users_code:answers
    ppo.reward_function tests.support.users_code:answers asks for 'answer', which ... has not: ...
train_sft --config.prepare=..:x
    prepare must be 'module:function', got '..:x': the name of the module must not begin ...
train_ppo --config.ppo.reward_model= --config.ppo.reward_function=math:pi
    ppo.reward_function must name a function, got 'math:pi', which is 3.14...
train_ppo --config.model.path={sft}
    model.path must be a model, got the stage folder '{sft}': name it as sft.init_from...
train_ppo --config.model.path={tmp}/none
    model.path: there is no folder or .gguf file {tmp}/none
train_ppo --config.model.path=package:none
    model.path: unknown model 'package:none'; choose from ['smollm2-135m-instruct']
train_ppo --config.ppo.init_from={tmp}/none
    ppo.init_from: there is no folder or .gguf file {tmp}/none
train_ppo --config.ppo.reward_model={tmp}/none
    ppo.reward_model: there is no folder or .gguf file {tmp}/none
train_reward --config.reward.init_from={tmp}/none
    reward.init_from: there is no folder or .gguf file {tmp}/none
"""

CONFIGS = r"""
rlhf # code def get_config(:
    {tmp}/config.py:1: invalid syntax (--help lists the flags)
rlhf # code def get_config():\n    return nothing
    {tmp}/config.py:2: name 'nothing' is not defined (--help lists the flags)
rlhf # code import nothing_at_all
    {tmp}/config.py:1: No module named 'nothing_at_all' (--help lists the flags)
rlhf # code settings = 1
    the config file must have a function get_config (--help lists the flags)
rlhf # code def get_config():\n    return {}
    get_config() of {tmp}/config.py must return a ConfigDict, got a dict
rlhf # config {"sed": 1}
    unknown setting sed; did you mean 'seed'?
rlhf # config {"ppo": {"kl_coeff": 0.1}}
    unknown setting ppo.kl_coeff; did you mean 'ppo.kl_coef'?
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
rlhf # config {"evaluate": {"judges": "tests.support.tiny_run:none"}}
    evaluate.judges must be 'module:function', got 'tests.support.tiny_run:none': ...'none'
rlhf # config {"evaluate": {"ratings": "none.jsonl"}}
    evaluate.ratings must be a file, got 'none.jsonl', which is not there
rlhf # config {"evaluate": {"num_prompts": 7}}
    evaluate.num_prompts must be at most the 6 prompts of {data}/test_prompts.jsonl, got 7
rlhf # config {"sft": None, "reward": None, "ppo": None, "evaluate": None}
    the config has none of the sections ['sft', 'reward', 'ppo', 'evaluate']; it has []
"""
