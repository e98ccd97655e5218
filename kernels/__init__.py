"""The Triton kernels, imported as `lvspec.kernels`.

One operation a file, named like its specification in `lvspec.reference`. A kernel trusts its
arguments: shapes, dtypes and devices were checked by `lvspec.ops`, its only caller. It knows numbers,
not policies, and nothing here imports transformers or any other part of lvspec.
"""

if __name__ != "lvspec.kernels":
    raise ImportError(
        f"This folder is lvspec.kernels and was imported as {__name__!r}, which shadows the HuggingFace "
        "package `kernels` that transformers looks for. The root of the lvspec sources is on sys.path: "
        "take it off by installing lvspec (pip install -e .) and running `lvspec`, `pytest` or a script "
        "by its path, or python with -P, instead of `python -c` or `python -m` in the root."
    )
