"""The Triton kernels, imported as `lvspec.kernels`.

One operation a file or folder, named like its specification in `lvspec.reference`. A kernel trusts
its arguments: `lvspec.ops`, its only caller, has checked shapes, dtypes and devices. It knows
numbers, not policies, and nothing here imports transformers or another part of lvspec, but for
`lvspec.rule`, which says what number stands where.
"""

if __name__ != "lvspec.kernels":
    raise ImportError(
        f"This folder is lvspec.kernels and was imported as {__name__!r}, which shadows the "
        "HuggingFace package `kernels` that transformers looks for. The root of the lvspec sources "
        "is on sys.path, as `python -c` and `python -m` put it there: install lvspec "
        "(pip install -e .) and run `lvspec`, `pytest`, or a script by its path."
    )
