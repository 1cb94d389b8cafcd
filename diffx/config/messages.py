"""Hydra's and OmegaConf's errors as one line that names the word, the reason and the nearest valid names."""


def explain(error: Exception, groups: dict[str, list[str]] | None = None) -> str:
    return repr(error)
