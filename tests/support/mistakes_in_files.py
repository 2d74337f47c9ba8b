"""Mistakes in data, models and run folders: as in `mistakes`, behind # what is wrong with them."""

DATA = r"""
train_sft --config.sft.data={lines} # lines
    {lines}: the file is empty, at least one line is needed
train_sft --config.sft.data={lines} # lines {"text": "a"}\n{"text": "b"\n
    {lines}:2: not a JSON object on one line: Expecting ',' delimiter at column 13
train_sft --config.sft.data={lines} # lines {"text": "a"}\n\n["text"]\n
    {lines}:3: a line must be a JSON object {...}, got ['text']
train_sft --config.sft.data={lines} # lines {"text": "a", "text": "b"}
    {lines}:1: not a JSON object on one line: a key is repeated in ['text', 'text']
train_sft --config.sft.data={lines} # lines {"body": "a"}
    {lines}:1: the keys must be ['text'] or ['prompt', 'completion']..., got ['body']
train_sft --config.sft.data={lines} # lines {"text": 7}
    {lines}:1: text must be a string, got 7
train_sft --config.sft.data={lines} --config.sft.validation_data={lines} # lines {"text": " "}
    sft.data: {lines}: none of the 1 records can be used: 1 blank
train_sft --config.sft.data={lines} # lines {"messages": []}
    {lines}:1: messages must be a list of messages, got []
train_sft --config.sft.data={lines} # lines {"messages": [{"role": "user"}]}
    {lines}:1: messages[0] must have role and content, got {'role': 'user'}
train_sft --config.sft.data={lines} # lines {"messages": [{"role": "robot", "content": "a"}]}
    {lines}:1: the role of messages[0] must be one of ['system', ...], got 'robot'
train_sft --config.sft.data={lines} # lines {"messages": [{"role": "user", "content": "a"}]}
    none of the 1 rows is rendered; {lines}:1: messages must have a turn of the assistant's to learn
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
    ppo.prompts: {lines}: none of the 1 records can be used: 1 blank
"""

MODELS = """
train_sft --config.model.path={model} # no config.json
    {model} has no config.json
train_sft --config.model.path={model} # torn config.json
    {model}/config.json is not JSON: ...
train_sft --config.model.path={model} # config.json {"model_type": "mamba"}
    {model}/config.json: model_type 'mamba' is not supported; choose from [...]
train_sft --config.model.path={model} # config.json {"hidden_act": "gelu"}
    {model}/config.json: hidden_act='gelu' is not supported for llama; only 'silu' is
train_sft --config.model.path={model} # config.json {"num_local_experts": 8}
    {model}/config.json: num_local_experts=8 is not supported for llama
train_sft --config.model.path={model} # config.json {"auto_map": {"a": "b"}}
    {model}/config.json: auto_map asks for code from the checkpoint, which is never ...
train_sft --config.model.path={model} # config.json {"intermediate_size": None}
    {model}/config.json: the option 'intermediate_size' is missing
train_sft --config.model.path={model} # config.json {"hidden_size": 33}
    {model}/config.json: hidden_size (33) must be a multiple of num_attention_heads (2)
train_sft --config.model.path={model} # config.json {"hidden_size": "32"}
    {model}/config.json: hidden_size must be a whole number from 1 to ..., got '32'
train_sft --config.model.path={model} # no model.safetensors
    {model} has no model.safetensors. To convert a model that you trust, ...
train_sft --config.model.path={model} # pickled weights
    {model} has no model.safetensors, only ['pytorch_model.bin'], and pickled weights ...
train_sft --config.model.path={model} # a shard is missing
    {model}/model.safetensors.index.json: weight_map['...'] is '2.safetensors', but ...
train_sft --config.model.path={model} # weights without a norm
    {model}: the weight files lack 1 tensors: model.norm.weight
train_sft --config.model.path={model} # weights with more
    {model}: the weight files hold 1 tensors that the model of config.json does not ...: model.more
train_sft --config.model.path={model} # torn model.safetensors
    {model}/model.safetensors is damaged: ...
train_sft --config.model.path={model} # weights of another shape
    {model}: model.norm.weight has shape (3,), but config.json asks for (32,)
train_ppo --config.model.path={model} # weights of another shape
    {model}: model.norm.weight has shape (3,), but config.json asks for (32,)
train_sft --config.model.path={model} # weights as integers
    {model}: model.norm.weight is stored as I8; choose from ['F32', 'F16', 'BF16']
generate --model={model} # torn model.safetensors
    {model}/model.safetensors is damaged: ...
generate --model={model} # weights of another shape
    {model}: model.norm.weight has shape (3,), but config.json asks for (32,)
train_sft --config.model.path={model} # torn tokenizer.json
    {model}/tokenizer.json is not JSON: ...
train_sft --config.model.path={model} # no tokenizer.json
    {model} has no tokenizer.json. To convert an older form: ...
train_sft --config.model.path={model} # no end of sequence
    {model}: the tokenizer has no end-of-sequence token; name one as eos_token in ...
train_sft --config.model.path={model} # config.json {"vocab_size": 100}
    {model}: model.embed_tokens.weight has shape (317, 32), but config.json asks for (100, 32)
train_sft --config.model.path={model} # fewer tokens than the tokenizer
    {model}: the tokenizer has ... tokens, the model 100
train_sft --config.model.path={lines} # lines
    {lines} is neither a folder nor a .gguf file
train_sft --config.model.path={tmp}/model.gguf # no GGUF
    {tmp}/model.gguf: it is not a readable GGUF file: ...
train_sft --config.model.path={tmp}/model.gguf # GGUF of another architecture
    {tmp}/model.gguf: GGUF architecture 'mamba' is not supported; choose from [...]
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
train_sft # a run begun with other data
    {texts} has changed since {tmp}/run/sft was begun (9 -> 4... rows): put it back, or ...
train_sft # a finished run with a torn config.json
    {tmp}/run/config.json is not JSON: ...
train_sft # a finished run with a torn results.json
    {tmp}/run/results.json is not JSON: ...
train_sft # a finished run with a listed config.json
    {tmp}/run/config.json must be a JSON object, got [1]
train_sft # a finished run with an empty config.json
    {tmp}/run/config.json must have the field config
train_sft # a finished run with a listed results.json
    {tmp}/run/results.json must be a JSON object, got [1]
train_sft # a finished run with a wrong results.json
    {tmp}/run/results.json: time/sft_s must be a number, got 'long'
train_sft # a finished run with a listed sft/stage.json
    {tmp}/run/sft/stage.json must be a JSON object, got [1]
train_sft # a finished run with a nested sft/stage.json
    {tmp}/run/sft/stage.json is not JSON: maximum recursion depth exceeded...
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
train_sft --config.model.path={base} --config.model.vocabulary_data={data}/prompts.jsonl
    {data}/prompts.jsonl:1: the keys must be ..., got ['prompt']
train_sft --config.model.path={model} --config.model.vocabulary_data={texts} # words
    model.vocabulary_data must be '' for {model}: only a BPE ..., this one is WordLevel
train_sft --config.model.path={model} --config.model.vocabulary_data={texts} # torn tokenizer.json
    {model}/tokenizer.json is not JSON: ...
"""
