"""A machine as `make gpu` sees it, and what its update leaves."""

MACHINE = {
    "environment": {
        "device": "cuda", "cpu": "A processor", "gpu": "NVIDIA H100 80GB HBM3", "threads": 2,
        "cores": 2, "simd": None, "torch": "2.11.0", "python": "3.12", "commit": "git's own",
        "date": "today", "peers": {}, "load_1min": 0.0, "driver": "580.1",
    },
    "capability": "9.0",
    "packages": {
        "pytest": True, "pytest-xdist": True, "pytest-timeout": True, "matplotlib": True,
        "transformers": True,
    },
    "gpu_is_shared": True,
    "ops": {"gae": 1, "token_logprobs": 3},
    "lacking": [],
}  # fmt: skip


RECORD = {
    "options": {
        "layers": 2, "hidden": 16, "vocab": 97, "dtype": "bfloat16", "prompts": 1, "tokens": 5,
        "completions": 3, "prompt_tokens": 8, "ragged": False, "copies": 2,
    },
    "where": "A GPU", "threads": 1, "torch": "2.11.0", "transformers": "5.17.0",
    "runs": {
        "fastrl, packed": {
            "seconds": [0.25], "peak_mib": 3.0, "loss": 0.5, "grad_difference": 0.0, "reason": "",
        },
        "padded copies, all logits": {"reason": "out of memory"},
    },
}  # fmt: skip
