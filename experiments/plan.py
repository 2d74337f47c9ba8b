"""Whether PPO with a config fits on a TPU topology, and how fast at best; from any machine.

python experiments/plan.py --config=configs/pod.py:llama3_8b --topology=v5p:4x4x4
python experiments/plan.py --config=configs/pod.py:qwen3_0_6b --topology=v5e:4x4 \
    --compare="fsdp=16;fsdp=8,model=2;fsdp=16,remat=dots"

Compiles the programs of an iteration with libtpu (`pip install 'ppo_jax[plan]'`); nothing is run,
no weights are made. Without --topology, or without libtpu, it plans for the local devices. The exit
code is 0 if the config (of several, one of them) fits, else 1.
"""

from ppo_jax.commands import plan

if __name__ == "__main__":
    plan.main()
