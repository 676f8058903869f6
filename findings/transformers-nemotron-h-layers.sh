#!/bin/sh
# transformers 5.19.0: Nemotron-H's configuration takes a number of layers, and ignores it.
#
# A config.json may say num_hidden_layers, as all others do, and hybrid_override_pattern, a letter for
# each layer.
# One would guess: without a pattern, as many layers as the number says, or an error; with both, an
# error where they differ.
# Seen: the number is dropped without a word. Without a pattern any number gives the four layers of
# the class's default; with one, the pattern's length is the number. A tool that shortens a model by
# num_hidden_layers, or sizes it by that key, has another model than the class builds.
#
# Runs for a minute, most of it the download of transformers without torch; prints what it saw, ends
# with 1 if that has changed. Nothing of OServe is used.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT INT TERM
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq transformers==5.19.0
cat > "$folder/show.py" <<'PYTHON'
import sys

from transformers import CONFIG_MAPPING

own = CONFIG_MAPPING["nemotron_h"]
seen = []
for given in (
    {"num_hidden_layers": 52},
    {"num_hidden_layers": 52, "hybrid_override_pattern": "MEM*EM"},
    {"num_hidden_layers": 2},
):
    config = own.from_dict(given)
    seen.append(config.num_hidden_layers)
    print(f"{given} -> {config.num_hidden_layers} layers: {config.layers_block_type}")
if seen != [4, 6, 4]:
    sys.exit("this has changed")
PYTHON
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/show.py"
