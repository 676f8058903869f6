#!/bin/sh
# transformers 5.19.0: EXAONE 4's sliding_window_pattern is a string in checkpoints, and a number in
# the class, which fails on the string with a TypeError that names neither.
#
# Published files say "sliding_window_pattern": "LLLG", a letter for each layer of a period (local or
# global), next to layer_types, which spells it out.
# One would guess: the class reads the letters where layer_types is missing, or refuses them by name.
# Seen: "unsupported operand type(s) for %", from counting layers modulo the string. With layer_types
# the string is kept unread; a number works as in Gemma and Cohere. So a file that was cut down, and
# lost its list since that no longer fitted, cannot be loaded.
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

own = CONFIG_MAPPING["exaone4"]
named = ["sliding_attention"] * 3 + ["full_attention"]
seen = []
for given in (
    {"sliding_window_pattern": "LLLG"},
    {"sliding_window_pattern": "LLLG", "layer_types": named},
    {"sliding_window_pattern": 4},
):
    try:
        seen.append(own.from_dict({"num_hidden_layers": 4, **given}).layer_types == named)
        print(f"{given} -> read")
    except TypeError as error:
        seen.append("%" in str(error))
        print(f"{given} -> {error}")
        continue
    if "layer_types" not in given and given["sliding_window_pattern"] == "LLLG":
        sys.exit("this has changed")
if not all(seen):
    sys.exit("this has changed")
PYTHON
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/show.py"
