"""`holdfast doctor`: what this machine can run."""

from __future__ import annotations


def doctor() -> None:
    """Show processor, memory, GPUs, versions, and which extras are installed."""
    import importlib.util
    from pathlib import Path

    import torch

    from holdfast.directory import free_gib, hardware, versions

    machine = hardware()
    print(f"processor     {machine['cpu']}, {machine['cores']} cores")
    print(f"memory        {machine['memory_gib']} GiB")
    print(f"disk          {free_gib(Path.cwd()):.0f} GiB free here")
    print(f"GPUs          {', '.join(machine['gpus']) or 'none: training runs on the processor'}")
    bfloat16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    print(f"bfloat16      {'yes' if bfloat16 else 'on the processor only, where it is slow'}")
    for name, version in versions().items():
        print(f"{name:14}{version}")
    for module, use in EXTRAS.items():
        found = importlib.util.find_spec(module) is not None
        print(f"{module:14}{'installed' if found else 'not installed'}: {use}")


EXTRAS = {
    "wandb": "logging, with training.arguments.report_to: wandb",
    "tensorboard": "logging, with training.arguments.report_to: tensorboard",
    "flash_attn": "faster attention on GPUs, with model.attention: flash_attention_2",
}
