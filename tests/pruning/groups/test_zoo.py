"""Published architectures of torchvision and timm: slicing equals masking, and little more is kept than by Torch-Pruning."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import nodelens as nl
from nodelens.network.open_attention import opened
from nodelens.network.outputs import tensors_of
from nodelens.pruning.surgery.mask import masked
from nodelens.pruning.surgery.slice import slice_units

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # the packages' own deprecations


def words(text: str) -> list[str]:
    return text.split()


MORE = 1.05  # parameters kept, as a multiple of what Torch-Pruning keeps

TORCHVISION = words("""
alexnet vgg11 vgg16_bn resnet18 resnet50 resnext50_32x4d wide_resnet50_2 squeezenet1_0 squeezenet1_1 densenet121 densenet169
inception_v3 googlenet mobilenet_v2 mobilenet_v3_small mobilenet_v3_large shufflenet_v2_x0_5 shufflenet_v2_x1_0 mnasnet0_5
mnasnet1_0 efficientnet_b0 efficientnet_b1 efficientnet_v2_s regnet_x_400mf regnet_x_800mf regnet_y_400mf regnet_y_800mf
convnext_tiny vit_b_32 swin_t swin_v2_t fcn_resnet50 deeplabv3_mobilenet_v3_large lraspp_mobilenet_v3_large r3d_18 mc3_18
r2plus1d_18 efficientnet_b2 convnext_small vgg13""")
TIMM = words("""
skresnet18 mobilevit_xxs mobilevitv2_050 levit_128s convnextv2_atto gmlp_ti16_224 mixer_s32_224 resmlp_12_224 botnet26t_256
deit_tiny_patch16_224 pit_ti_224 poolformer_s12 swin_tiny_patch4_window7_224 efficientformer_l1 hrnet_w18_small dla34
visformer_tiny res2net50_26w_4s resnest14d resnetv2_50 repvgg_a0 rexnet_100 tinynet_e lcnet_050 cspresnet50 darknet53
ese_vovnet19b_dw inception_next_atto convmixer_768_32 beit_base_patch16_224 eva02_tiny_patch14_224 fastvit_t8 repvit_m0_9
tiny_vit_5m_224 efficientvit_b0 mobileone_s0 seresnet50 dpn48b xception41 hardcorenas_a fbnetc_100 selecsls42 starnet_s1
vit_tiny_patch16_224 mobilenetv4_conv_small twins_pcpvt_small davit_tiny resnetv2_50x1_bit ghostnet_050 pvt_v2_b0
cait_xxs24_224 nf_regnet_b0""")
SIZES = {"inception_v3": (96, 96), "r3d_18": (4, 32, 32), "mc3_18": (4, 32, 32), "r2plus1d_18": (4, 32, 32)}
# Torch-Pruning raises, does not end, leaves a model that does not run, or removes 10 of 12 channels for a half (ghostnet)
WITHOUT_ORACLE = words("""
shufflenet_v2_x0_5 shufflenet_v2_x1_0 vit_b_32 swin_t swin_v2_t skresnet18 levit_128s gmlp_ti16_224 mixer_s32_224
resmlp_12_224 poolformer_s12 swin_tiny_patch4_window7_224 visformer_tiny res2net50_26w_4s rexnet_100 cspresnet50
botnet26t_256 ghostnet_050 pvt_v2_b0 cait_xxs24_224 nf_regnet_b0 mobilevitv2_050""")


def of_torchvision(name: str) -> tuple[nn.Module, Tensor]:
    models = pytest.importorskip("torchvision").models
    options = {"image_size": 64} if name == "vit_b_32" else {}
    options |= {"weights_backbone": None} if name.startswith(("fcn", "deeplab", "lraspp")) else {}
    options |= {"init_weights": False, "aux_logits": False} if name in ("inception_v3", "googlenet") else {}
    return models.get_model(name, weights=None, **options), torch.randn(2, 3, *SIZES.get(name, (64, 64)))


def of_timm(name: str) -> tuple[nn.Module, Tensor]:
    """The model with small images, if it takes them."""
    timm = pytest.importorskip("timm")
    small = 128 if name.startswith(("swin", "davit", "tiny_vit")) else 64
    for options, size in (({"img_size": small}, small), ({}, 96), ({}, None)):
        try:
            model = timm.create_model(name, **options).eval()
            x = torch.randn(2, *((3, size, size) if size else model.default_cfg["input_size"]))
            torch.export.export(model, (x,))
        except Exception:
            if size is None:
                raise
        else:
            return model, x
    raise AssertionError


def small_window_transformer(version: int) -> tuple[nn.Module, Tensor]:
    swin = pytest.importorskip("torchvision").models.swin_transformer
    options = {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2} if version == 2 else {}
    return swin.SwinTransformer([4, 4], 24, [2, 2], [2, 4], [4, 4], num_classes=10, **options), torch.randn(2, 3, 64, 64)


def small_of_timm(name: str, size: int, **options) -> tuple[nn.Module, Tensor]:
    return pytest.importorskip("timm").create_model(name, img_size=size, **options), torch.randn(2, 3, size, size)


HEADS = {  # attention whose own code hides its heads
    "swin of torchvision": lambda: small_window_transformer(1),
    "swin 2 of torchvision": lambda: small_window_transformer(2),
    "vit of torchvision": lambda: of_torchvision("vit_b_32"),
    "swin 2 of timm": lambda: small_of_timm("swinv2_tiny_window8_256", 128, depths=(2, 2), embed_dim=48, num_heads=(4, 8)),
    "beit": lambda: small_of_timm("beit_base_patch16_224", 64, depth=2, embed_dim=96, num_heads=4),
    "beit with positions": lambda: small_of_timm("beitv2_base_patch16_224", 64, depth=2, embed_dim=96, num_heads=4),
    "eva": lambda: small_of_timm("eva02_tiny_patch14_224", 56, depth=2, embed_dim=96, num_heads=4),
}


def disturb(model: nn.Module) -> nn.Module:
    """No weight is constant: a head of zeros, or layer scales of 1e-6, would hide what is computed."""
    for module in model.modules():
        for _, p in module.named_parameters(recurse=False):
            if p.numel() > 1 and (float(p.detach().std()) == 0 or float(p.detach().abs().max()) < 1e-3):
                p.data.add_(torch.randn_like(p) * 0.1)
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.add_(torch.randn_like(module.running_mean) * 0.1)
            module.running_var.mul_(torch.rand_like(module.running_var) + 0.5)
    return model.eval()


def logits(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return tensors_of(model(x))[0]


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def half(groups) -> dict[str, list[int]]:
    return {g.name: torch.randperm(g.n)[: min(g.n - 1, math.floor(g.n / 2 + 0.5))].tolist() for g in groups}


def parameters_of_the_oracle(model: nn.Module, x: Tensor) -> int:
    """Parameters after Torch-Pruning has removed half of everything but the layers of the output."""
    oracle = pytest.importorskip("torch_pruning")
    classes, heads = logits(model, x).shape[1], {}
    last = [m for m in model.modules() if classes in (getattr(m, "out_features", 0), getattr(m, "out_channels", 0))]
    attention = [m for m in model.modules() if isinstance(getattr(m, "num_heads", None), int)]
    for module in attention:
        named = (getattr(module, name, None) for name in ("qkv", "q", "k", "v", "q_proj", "k_proj", "v_proj", "kv"))
        heads |= {layer: module.num_heads for layer in named if isinstance(layer, nn.Linear)}
    importance = oracle.importance.RandomImportance()
    oracle.pruner.BasePruner(model, x, importance, pruning_ratio=0.5, ignored_layers=last, num_heads=heads).step()
    for module in attention:
        if isinstance(getattr(module, "qkv", None), nn.Linear):  # numbers that it does not update
            width = module.qkv.out_features // 3
            for name, value in {"head_dim": width // module.num_heads, "attn_dim": width}.items():
                setattr(module, name, value) if hasattr(module, name) else None
    logits(model, x)
    return parameters(model)


@pytest.mark.parametrize("name", [*TORCHVISION, *TIMM])
def test_a_published_architecture(name):
    torch.manual_seed(0)
    model, x = (of_torchvision if name in TORCHVISION else of_timm)(name)
    model = disturb(model)
    groups = nl.find_groups(model, x)
    exact = [group for group in groups if group.exact]
    if exact:
        removed = half(exact)
        sliced = slice_units(copy.deepcopy(model), exact, removed)
        with masked(model, exact, removed):
            expected = logits(model, x)
        assert float((logits(sliced, x) - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    pruned = slice_units(copy.deepcopy(model), groups, half(groups))
    assert logits(pruned, x).shape == logits(model, x).shape
    kept = parameters(pruned) / parameters(model)
    assert 0.2 < kept < 0.75
    if name not in WITHOUT_ORACLE:
        assert parameters(pruned) <= MORE * parameters_of_the_oracle(model, x)


@pytest.mark.parametrize("name", HEADS)
def test_hidden_heads_are_removed_and_saved(name, tmp_path):
    torch.manual_seed(0)
    model, x = HEADS[name]()
    model = disturb(model)
    with torch.no_grad(), opened(model):
        shown = model(x)
    assert float((shown - logits(model, x)).abs().max()) <= 1e-5 * float(shown.abs().max())
    sliced, zeroed = (nl.prune(model, "magnitude", 0.5, scope="head", example_inputs=x, apply=how) for how in ("slice", "mask"))
    assert sliced.plan.about["macs"] < sliced.plan.about["dense_macs"]
    found, expected = logits(sliced.model.eval(), x), logits(zeroed.model.eval(), x)
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    assert parameters(sliced.model) == sliced.plan.about["params"] < parameters(model)
    torch.manual_seed(1)
    again = nl.load_pruned(sliced.save(tmp_path), HEADS[name]()[0])
    assert torch.equal(logits(again, x), found)
