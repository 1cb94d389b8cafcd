"""Motif-2.6B (``model_type: motif``) as a ``diff_v1``: its published layout, read without its code.

Its maps are in our order of pairs. It rotates features i and i + d/2 of a head, a ``Decoder`` 2i
and 2i + 1, so that rows of queries and keys are reordered.
"""

from typing import Any

from diffx.config import UserError
from diffx.config.model import DiffV1Config, Ffn
from diffx.hub.configs import MotifConfig
from diffx.hub.convert import checked_shape, reorder_features
from diffx.hub.registered import DiffxForCausalLM, to_diffx

_NAMES = {r"^model\.": "decoder.", r"^lm_head\.": "decoder.lm_head.", "subln": "sublayer_norm"}
_KEPT = ("max_position_embeddings", "bos_token_id", "eos_token_id", "name_or_path", "_commit_hash")


def decoder_config(config: MotifConfig) -> DiffV1Config:
    """The ``diff_v1`` of a config.

    Raises:
        ValueError: another activation, scaled RoPE, a window or another head width.
    """
    if getattr(config, "use_sliding_window", False):
        raise ValueError("a motif with use_sliding_window=True cannot be converted")
    return DiffV1Config(
        **checked_shape(config, "poly_norm"),
        ffn=Ffn.polynorm,
        lambda_init="depth-1",
        sublayer_norm_eps=config.attn_rms_norm_eps,
    )


class MotifForCausalLM(DiffxForCausalLM):
    """Reads the published weights; ``from_pretrained`` gives a ``DiffxForCausalLM``."""

    config_class = MotifConfig
    _keep_in_fp32_modules_strict = ["lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"]  # noqa: RUF012  # the type that the base class gives it

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **options: Any) -> Any:
        """As in ``transformers``.

        Raises:
            UserError: the files hold weights that the layout does not have.
        """
        model, report = super().from_pretrained(
            *args, key_mapping=_NAMES, output_loading_info=True, **options
        )
        tied = "lm_head" if model.decoder.lm_head is None else "rotary_emb"
        extra = [name for name in report["unexpected_keys"] if tied not in name]
        if extra:
            raise UserError(f"{args[0]} cannot be used: {min(extra)} is not of Motif-2.6B's layout")
        decoder = model.decoder
        decoder.load_state_dict(reorder_features(decoder.state_dict(), decoder.config))
        converted = to_diffx(decoder).eval()
        for name in _KEPT:
            setattr(converted.config, name, getattr(model.config, name, None))
        converted.generation_config = model.generation_config
        return (converted, report) if output_loading_info else converted
