"""vLLM's own serving benchmark, unchanged, against a running server.

    .venv/bin/python benchmarks/clients/vllm_bench.py --base-url http://127.0.0.1:8000 \
        --model tiny-llama --tokenizer .oserve/models/tiny-llama --num-prompts 100 --request-rate 6

All options are those of `vllm bench serve`, whose command does not start in the CPU build.
"""

import argparse

from vllm.benchmarks.serve import add_cli_args, main

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    add_cli_args(parser)
    main(parser.parse_args())
