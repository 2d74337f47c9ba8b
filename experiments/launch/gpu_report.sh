#!/usr/bin/env bash
# What one NVIDIA GPU does, in at most 15 minutes: tests, kernels, iterations, rollout, trace.
#
#   SETUP=1 bash experiments/launch/gpu_report.sh                 # once: a virtual environment
#   bash experiments/launch/gpu_report.sh --report=runs/gpu          # JSON lines, runs/gpu/report.json
#   bash experiments/launch/gpu_report.sh --table=runs/gpu/report.json    # as a table of Markdown
#   bash experiments/launch/gpu_report.sh --tiny                  # on a CPU, to see that it runs
#
# PYTHON is another interpreter, with jax[cuda12], this package and pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
environment=.venv

if [ "${SETUP:-}" = 1 ]; then
  python3 -m venv "$environment"
  exec "$environment/bin/pip" install 'jax[cuda12]' 'pytest>=8' 'pytest-xdist>=3.7' -e .
fi

python=${PYTHON:-python}
if [ -z "${PYTHON:-}" ] && [ -x "$environment/bin/python" ]; then
  python=$environment/bin/python
fi
exec "$python" experiments/benchmark.py gpu_report "$@"
