"""The methods by which models are merged (merge.py), and the settings that each takes beside the weights."""

METHODS = {
    "linear": (),
    "slerp": (),
    "task_arithmetic": ("base", "scale"),
    "ties": ("base", "scale", "density"),
    "dare_linear": ("base", "scale", "density", "seed"),
    "dare_ties": ("base", "scale", "density", "seed"),
}
SHARES = ("linear", "slerp", "ties")  # those of whose weights only the ratios matter
