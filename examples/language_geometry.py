"""The geometry of the residual stream of a tiny random Llama, and its feed-forward channels. No download, seconds on a CPU."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import nodelens as nl


def main() -> nl.GeometryResult:
    """Dimensions per layer, novelty per step, and two metrics of the hidden channels."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config).eval()  # random weights: use from_pretrained(...) for a trained model
    tokens = torch.randint(config.vocab_size, (64, 64))
    texts = [{"input_ids": part, "labels": part} for part in tokens.split(8)]

    geometry = nl.analyze_model(model, texts, max_tokens=4_000, hook_point="residual_output")
    print("layers: participation ratio (dimension), its debiased counterpart, mean cosine of two tokens")
    print(geometry.metrics[["d_pr", "d_pr_debiased", "cos_sim_mean"]].round(3))
    print("\nsteps: share of the variance in directions that the layer before did not use")
    columns = ["transition", "feature_subspace_novelty", "linear_cka", "layer_cosine_sim"]
    print(geometry.novelty[columns].round(3).to_string(index=False))

    units = nl.analyze(model, texts, ["activation_variance", "scar_loss_proxy"], layers="blocks[n//2:].mlp.hidden").units
    print("\nhidden channels with the largest loss proxy")
    print(units[["scar_loss_proxy", "scar_loss_proxy_se"]].nlargest(3, "scar_loss_proxy"))
    return geometry


if __name__ == "__main__":
    main()
