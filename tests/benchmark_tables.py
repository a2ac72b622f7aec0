"""The tables of docs/benchmarks.md: of which result file each is, and of which of its numbers."""

MS = 1000.0  # from seconds
PERCENT = 100.0

# file -> heading of the table's columns: key of a row and factor. "case" is the first column.
TABLES = {
    "bench_limit": {
        "ours, ms": ("seconds", MS),
        "gradient steps in Numba": ("ratio to Numba", 1),
        "in NumPy": ("ratio to NumPy", 1),
        "in torch with autograd, extrapolated": ("ratio to torch autograd", 1),
        "single end points": ("ratio", 1),
    },
    "bench_flow": {
        "ours, ms": ("seconds", MS),
        "torchdiffeq dopri5": ("ratio", 1),
    },
    "bench_sensing": {
        "ours, s": ("seconds", 1),
        "literal autograd, extrapolated": ("ratio", 1),
        "fastest autograd, extrapolated": ("ratio to the fastest", 1),
    },
    "bench_pursuit": {
        "ours, ms": ("seconds", MS),
        "LassoLars": ("ratio to LassoLars", 1),
        "celer": ("ratio to celer", 1),
        "HiGHS": ("ratio to HiGHS", 1),
        "Clarabel": ("ratio to Clarabel", 1),
    },
    "bench_paths": {
        "ours, s": ("seconds", 1),
        "separate solves": ("ratio", 1),
        "ours as a multiple of celer_path": ("times celer_path's time", 1),
    },
    "bench_regression": {
        "ours, s": ("seconds", 1),
        "LassoCV, s": ("LassoCV, seconds", 1),
        "times LassoCV's time": ("times LassoCV's time", 1),
        "its processor time": ("times LassoCV's processor time", 1),
        "our non-zeros": ("non-zeros", 1),
        "LassoCV's": ("LassoCV: non-zeros", 1),
        "our CV error": ("error on the samples left out", 1),
        "LassoCV's CV error": ("LassoCV: error on the samples left out", 1),
        "memory, times X": ("times X", 1),
    },
    "bench_completion": {
        "ours, s": ("seconds", 1),
        "soft-impute": ("ratio", 1),
        "soft-impute's error": ("soft-impute: relative error", 1),
    },
    "bench_custom": {
        "ours, ms": ("seconds", MS),
        "automatic differentiation": ("ratio to automatic differentiation", 1),
        "Newton's method on R_a": ("ratio", 1),
    },
    "bench_depth": {
        "ours, ms": ("seconds", MS),
        "ours as a multiple of two factors": ("ratio to two factors", 1),
        "200,000 steps in NumPy": ("ratio to NumPy", 1),
        "200,000 steps in Numba": ("ratio to Numba", 1),
    },
    "bench_account": {
        "a step, ms": ("step, seconds", MS),
        "times a step without the account": ("ratio", 1),
    },
    "bench_optimizer": {
        "MirrorAdam, ms": ("MirrorAdam, seconds", MS),
        "times AdamW's foreach": ("ratio to AdamW, foreach", 1),
        "times its for-loop": ("ratio to AdamW, for-loop", 1),
        "times its fused kernel": ("ratio to AdamW, fused", 1),
    },
    "bench_neighbour": {
        "beside a busy process, ms": ("seconds", MS),
        "without, ms": ("without, seconds", MS),
        "ratio": ("ratio", 1),
    },
    "bench_ratings": {
        "RMSE, median of the splits": ("RMSE", 1),
        "processor seconds": ("processor seconds", 1),
    },
    "bench_truncate": {
        "ours, s": ("seconds", 1),
        "dense SVDs, extrapolated": ("ratio", 1),
        "kohya's resize, extrapolated": ("ratio to kohya's resize", 1),
        "peft.convert_to_lora, extrapolated": ("ratio to peft.convert_to_lora", 1),
    },
    "bench_spectrum": {
        "ours, ms": ("seconds", MS),
        "dense SVDs in float64": ("ratio, at equal accuracy", 1),
        "dense SVDs in float32": ("ratio to float32", 1),
    },
    "bench_overhead": {
        "ours, ms": ("seconds", MS),
        "of a plain step, %": ("part of a step", PERCENT),
    },
    "bench_networks": {
        "ours as a multiple of a plain loop": ("time to plain", 1),
        "compiled: times faster than eager": ("times faster compiled", 1),
        "six models stacked: times faster than in turn": ("times faster stacked", 1),
    },
    "bench_sweep": {
        "shared, s": ("seconds shared", 1),
        "one by one, s": ("seconds one by one", 1),
        "steps saved, %": ("steps saved", PERCENT),
        "overhead of the whole sweep, %": ("overhead of the whole sweep", PERCENT),
    },
    "bench_scaling": {
        "largest size, s": ("seconds", 1),
        "exponent": ("exponent", 1),
    },
}
