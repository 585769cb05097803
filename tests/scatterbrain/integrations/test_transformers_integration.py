"""The attention implementation "scatterbrain" in models of transformers, against their own "sdpa"."""

from __future__ import annotations

import copy
import inspect
import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import scatterbrain
from scatterbrain.errors import UserError
from scatterbrain.integrations import transformers as integration

transformers = pytest.importorskip("transformers", minversion="5.0")
from transformers import masking_utils  # noqa: E402

LENGTH = 48
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
# from 5.4 on, a mask function gets the number of queries
NOTES = "q_length" in inspect.signature(masking_utils.sdpa_mask).parameters
needs_notes = pytest.mark.skipif(not NOTES, reason="before transformers 5.4, masks have no notes")


def bert(**options) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        **SIZES, vocab_size=50, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **options
    )
    return made(transformers.BertModel(config))


def llama(**options) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, vocab_size=50, **options)
    return made(transformers.LlamaForCausalLM(config))


def vit() -> nn.Module:
    return made(transformers.ViTModel(transformers.ViTConfig(**SIZES, image_size=56, patch_size=8)))


def made(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # queries and keys of some size
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def inputs(padding: str = "none") -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 50, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    if padding == "right":
        mask[1, -17:] = 0
    if padding == "left":
        mask[1, :17] = 0
    return {"input_ids": ids, "attention_mask": mask}


def output(model: nn.Module, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        out = model(**kwargs)
    return out.logits if "logits" in out else out.last_hidden_state


def outcomes(model: nn.Module) -> set[str]:
    return {outcome for counts in integration.report(model).values() for outcome in counts}


EXACT = {"full": {}, "local": {"local_context": 2 * LENGTH + 5}}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("make", [bert, llama])
def test_text_models_with_padding(make, method, padding, inference):
    """Encoder and decoder (causal, grouped queries, rotary embeddings), at the positions of the tokens."""
    model, x = make(), inputs(padding)
    tokens = x["attention_mask"].bool()
    expected = output(model, **x)[tokens]
    integration.replace(model, method, 16, **EXACT[method])
    with torch.inference_mode(inference):
        out = output(model, **x)[tokens]
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    if NOTES or padding == "none":
        assert outcomes(model) == {"routed"}
    assert len(integration.report(model)) == 2


@pytest.mark.parametrize("method", EXACT)
def test_vision_models(method):
    model, x = vit(), {"pixel_values": torch.randn(2, 3, 56, 56)}
    expected = output(model, **x)
    integration.replace(model, method, 16, **({"local_context": 101} if method == "local" else {}))
    torch.testing.assert_close(output(model, **x), expected, rtol=1e-5, atol=1e-5)
    assert outcomes(model) == {"routed"}
    integration.replace(model, "sbcluster", 16)
    assert not torch.allclose(output(model, **x), expected, atol=1e-4)
    assert outcomes(model) == {"routed"}


@pytest.mark.parametrize("make", [bert, llama])
def test_methods_that_take_no_mask_leave_padding_to_sdpa(make):
    model = integration.replace(make(), "smyrf", 16)
    plain = make()
    for padding in ("right", "left"):
        x = inputs(padding)
        tokens = x["attention_mask"].bool()
        torch.testing.assert_close(output(model, **x)[tokens], output(plain, **x)[tokens])
    assert "routed" not in outcomes(model)


def test_a_causal_model_and_a_method_that_is_not():
    model = integration.replace(llama(), "cluster", 16)
    torch.testing.assert_close(output(model, **inputs()), output(llama(), **inputs()))
    assert outcomes(model) == {"causal, and cluster is not"}


@pytest.mark.parametrize("padding", ["none", pytest.param("left", marks=needs_notes)])
def test_a_causal_model_with_landmarks(padding):
    """Several chunks of 64 tokens and grouped queries: prefill is routed, decoding is not."""
    model, plain = integration.replace(llama(), "sbcluster", 16, num_landmarks=32), llama()
    ids = torch.randint(0, 50, (2, 300), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padding == "left":
        mask[1, :77] = 0
    tokens = mask.bool()
    out, expected = (output(each, input_ids=ids, attention_mask=mask) for each in (model, plain))
    assert outcomes(model) == {"routed"}
    # the first tokens see no landmarks
    torch.testing.assert_close(out[0, :64], expected[0, :64], rtol=1e-4, atol=1e-4)
    few = output(integration.replace(llama(), "sbcluster", 16, num_landmarks=1), input_ids=ids, attention_mask=mask)
    errors = [(x - expected)[tokens].norm().item() for x in (out, few)]
    assert 0 < errors[0] < 0.7 * errors[1]
    changed = ids.clone()
    changed[:, 200:] = 7
    changed[~tokens] = 3
    before, after = (output(model, input_ids=x, attention_mask=mask)[:, :200] for x in (ids, changed))
    torch.testing.assert_close(after[tokens[:, :200]], before[tokens[:, :200]])
    with torch.no_grad():
        grown = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert grown.shape == (2, 303)
    assert outcomes(model) == {"routed", "another number of queries than of keys (cross-attention, or a cache)"}


@needs_notes
@pytest.mark.parametrize("padding", ["right", "left"])
def test_hidden_tokens_have_no_influence(padding):
    for make, method in ((bert, "sbcluster"), (bert, "sblocal"), (llama, "sblocal")):
        model, x = integration.replace(make(), method, 16), inputs(padding)
        tokens = x["attention_mask"].bool()
        changed = x | {"input_ids": torch.where(tokens, x["input_ids"], 49 - x["input_ids"])}
        out = output(model, **x)
        torch.testing.assert_close(output(model, **changed)[tokens], out[tokens])
        assert outcomes(model) == {"routed"}
    later = x["input_ids"].clone()
    later[0, 30:] = 3
    after = output(model, **(x | {"input_ids": later}))
    torch.testing.assert_close(after[0, :30], out[0, :30])
    assert not torch.allclose(after[0, 30:], out[0, 30:], atol=1e-3)


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_decoding_with_a_cache(padding, cache):
    x = inputs(padding)
    options = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": cache, "pad_token_id": 0}
    options |= {"return_dict_in_generate": True, "output_logits": True, "disable_compile": True}
    expected = llama().generate(**x, **options)
    model = integration.replace(llama(), "full", 16)
    out = model.generate(**x, **options)
    assert torch.equal(out.sequences, expected.sequences)
    for one, other in zip(out.logits, expected.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    counts = next(iter(integration.report(model).values()))
    # the first call is the prompt
    if cache == "dynamic" and (NOTES or padding == "none"):
        assert counts == {"routed": 1, "another number of queries than of keys (cross-attention, or a cache)": 5}


def test_prompts_in_parts():
    """The second part sees the cache: queries are the last of the keys."""
    model, plain, x = integration.replace(llama(), "full", 16), llama(), inputs()
    outs = []
    for each in (model, plain):
        with torch.no_grad():
            first = each(input_ids=x["input_ids"][:, :20], use_cache=True)
            (name,) = {"cache", "past_key_values"} & set(inspect.signature(each.model.forward).parameters)
            outs.append(each(input_ids=x["input_ids"][:, 20:], **{name: first[name]}).logits)
    torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outs[0], output(plain, **x)[:, 20:], rtol=1e-4, atol=1e-4)


def test_windows_of_a_model_are_kept():
    config = transformers.MistralConfig(**SIZES, num_key_value_heads=2, vocab_size=50, sliding_window=8)
    model = made(transformers.MistralForCausalLM(config))
    for padding in ("none", "left"):
        x = inputs(padding)
        tokens = x["attention_mask"].bool()
        expected = output(integration.restore(model), **x)[tokens]
        assert torch.equal(output(integration.replace(model, "full", 16), **x)[tokens], expected)
        assert outcomes(model) == {"attn_mask that differs by query or head"}


def test_packed_sequences_are_kept():
    model, x = llama(), {"input_ids": inputs()["input_ids"]}
    x["use_cache"] = False
    x["position_ids"] = torch.cat([torch.arange(30), torch.arange(LENGTH - 30)]).expand(2, -1)
    expected = output(model, **x)
    torch.testing.assert_close(output(integration.replace(model, "full", 16), **x), expected, rtol=1e-5, atol=1e-5)
    assert "routed" not in outcomes(model)


def test_a_mask_of_ones_own_is_kept():
    model = llama()
    mask = (torch.rand(2, 1, LENGTH, LENGTH) > 0.5) | torch.eye(LENGTH, dtype=torch.bool)
    x = {"input_ids": inputs()["input_ids"], "attention_mask": mask}
    expected = output(model, **x)
    assert torch.equal(output(integration.replace(model, "full", 16), **x), expected)
    assert "routed" not in outcomes(model)


def test_cross_attention_of_a_decoder():
    config = {"is_decoder": True, "add_cross_attention": True}
    states, hidden = torch.randn(2, 20, 32), torch.ones(2, 20, dtype=torch.long)
    hidden[0, :7] = 0
    x = inputs("right") | {"encoder_hidden_states": states, "encoder_attention_mask": hidden}
    model, tokens = bert(**config), x["attention_mask"].bool()
    expected = output(model, **x)[tokens]
    integration.replace(model, "full", 16)
    torch.testing.assert_close(output(model, **x)[tokens], expected, rtol=1e-5, atol=1e-5)
    if NOTES:
        assert len(outcomes(model)) == 2


@needs_notes
@pytest.mark.parametrize("inference", [False, True])
def test_a_mask_changed_after_its_note_is_kept(inference):
    """In place, the note is out of date; by an operation, the result has none."""
    model, module = llama(), nn.Module()
    module.is_causal = True
    vars(module)["scatterbrain_router"] = scatterbrain.integrations.router.Router("full", 16)
    query, key, value = torch.randn(3, 2, 4, LENGTH, 8).unbind()
    arguments = {"config": model.config, "device": "cpu", "dtype": torch.float32}
    with torch.inference_mode(inference):
        mask = integration.attention_mask_function(
            batch_size=2,
            q_length=LENGTH,
            kv_length=LENGTH,
            mask_function=masking_utils.causal_mask_function,
            attention_mask=inputs("right")["attention_mask"].bool(),
            **arguments,
        )
        call = (module, query, key, value)
        integration.attention_forward(*call, mask)
        assert module.scatterbrain_router.counts() == {"routed": 1}
        changed = mask & torch.eye(LENGTH, dtype=torch.bool)
        mask &= torch.eye(LENGTH, dtype=torch.bool)
        for each in (mask, changed):
            out, _ = integration.attention_forward(*call, each)
            torch.testing.assert_close(out[0], value.transpose(1, 2)[0])
    assert module.scatterbrain_router.counts()["routed"] == 1


@pytest.mark.parametrize("name", ["softcap", "position_bias", "s_aux", "sinks"])
def test_refusals(name):
    query = torch.randn(1, 2, LENGTH, 8)
    with pytest.raises(UserError, match=f"Module has {name}, which attn_implementation='scatterbrain' cannot"):
        integration.attention_forward(nn.Module(), query, query, query, None, **{name: torch.ones(1)})
    out, _ = integration.attention_forward(nn.Module(), query, query, query, None, **{name: None})
    assert out.shape == (1, LENGTH, 2, 8)


def test_a_model_with_a_soft_cap_is_refused():
    config = transformers.Gemma2Config(**SIZES, num_key_value_heads=2, vocab_size=50, head_dim=8)
    model = integration.replace(transformers.Gemma2ForCausalLM(config).eval(), "full", 16)
    with pytest.raises(UserError, match="Gemma2Attention has softcap"):
        output(model, **inputs())


def test_scaling_of_the_layer():
    model = bert()
    for layer in model.encoder.layer:
        layer.attention.self.scaling = 0.9 / math.sqrt(3)
    expected = output(model, **inputs())
    torch.testing.assert_close(output(integration.replace(model, "full", 16), **inputs()), expected)
    assert not torch.allclose(output(bert(), **inputs()), expected, atol=1e-3)


# Options, copies and the way back -----------------------------------------------------------------------------------


def test_the_implementation_by_name():
    integration.register()
    config = transformers.BertConfig(**SIZES, vocab_size=50, attn_implementation="scatterbrain")
    model = transformers.BertModel(config).eval()
    assert model.config._attn_implementation == "scatterbrain"
    output(model, **inputs())
    assert outcomes(model) == {"fewer than 1024 tokens"}
    config = transformers.BertConfig(
        **SIZES | {"num_hidden_layers": 1},
        vocab_size=50,
        max_position_embeddings=1024,
        attn_implementation="scatterbrain",
    )
    model = transformers.BertModel(config).eval()
    output(model, input_ids=torch.zeros(1, 1024, dtype=torch.long))
    assert outcomes(model) == {"routed"}


@pytest.mark.parametrize("padding", ["none", pytest.param("left", marks=needs_notes)])
def test_a_causal_model_by_name(padding):
    """Causal `sbcluster` computes a prompt of 1,024 tokens, with its budget of 1/32, and "sdpa" the tokens after it."""
    integration.register()
    model = llama(attn_implementation="scatterbrain")
    ids = torch.randint(0, 50, (2, 1024), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padding == "left":
        mask[1, :200] = 0
    with torch.no_grad():
        grown = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert grown.shape == (2, 1027)
    for counts in integration.report(model).values():
        assert counts == {"routed": 1, "another number of queries than of keys (cross-attention, or a cache)": 2}
    router = model.model.layers[0].self_attn.scatterbrain_router
    (module,) = router._modules.values()
    assert isinstance(module, scatterbrain.ATTENTIONS["sbcluster"].module)
    assert module.causal
    expected = integration.replace(llama(), "sbcluster", memory_fraction=1 / 32)
    torch.testing.assert_close(
        output(model, input_ids=ids, attention_mask=mask), output(expected, input_ids=ids, attention_mask=mask)
    )


def test_options_of_layers():
    model = bert()
    integration.replace(
        model, "local", 16, layers={"encoder.layer.0.*": {"method": "full"}, "*.1.attention.self": None}
    )
    output(model, **inputs())
    assert integration.report(model) == {"encoder.layer.0.attention.self": {"routed": 1}}
    assert model.encoder.layer[0].attention.self.scatterbrain_router.method == "full"
    with pytest.raises(UserError, match="no layer is named 'encoder"):
        integration.replace(model, "local", layers={"encoder.layer.7.*": None})


def test_random_parts_differ_by_layer_and_stay_in_copies():
    model = integration.replace(bert(), "performer", 16, seed=3)
    out = output(model, **inputs())
    assert torch.equal(output(copy.deepcopy(model), **inputs()), out)
    seeds = [layer.attention.self.scatterbrain_router.seed for layer in model.encoder.layer]
    assert seeds[0] != seeds[1]
    assert not torch.allclose(output(integration.replace(model, "performer", 16, seed=99), **inputs()), out, atol=1e-4)


def test_the_way_back():
    model = bert()
    state, before = set(model.state_dict()), model.config._attn_implementation
    expected = output(model, **inputs())
    integration.replace(model, "local", 16)
    integration.replace(model, "performer", 16)
    assert set(model.state_dict()) == state
    assert not torch.allclose(output(model, **inputs()), expected, atol=1e-4)
    other = integration.restore(copy.deepcopy(model))
    assert integration.restore(model).config._attn_implementation == before == other.config._attn_implementation
    assert torch.equal(output(model, **inputs()), expected)
    assert torch.equal(output(other, **inputs()), expected)
    assert integration.report(model) == {}


def test_replace_after_the_user_chose_another_implementation():
    model = integration.replace(bert(), "local", 16)
    expected = output(model, **inputs())
    model.set_attn_implementation("eager")
    integration.replace(model, "local", 16)
    assert torch.equal(output(model, **inputs()), expected)
    assert integration.restore(model).config._attn_implementation == "eager"


def test_saving_names_no_implementation(tmp_path):
    model = integration.replace(bert(), "local", 16)
    model.save_pretrained(tmp_path)
    loaded = transformers.BertModel.from_pretrained(tmp_path)
    torch.testing.assert_close(output(loaded.eval(), **inputs()), output(integration.restore(model), **inputs()))


def test_gradients_and_dropout():
    model = integration.replace(bert(), "sbcluster", 16).train()
    model(**inputs()).last_hidden_state.sum().backward()
    assert outcomes(model) == {"routed"}
    assert all(x.grad.isfinite().all() for x in model.encoder.parameters())
    for layer in model.encoder.layer:
        layer.attention.self.dropout.p = 0.5
    model(**inputs())
    assert outcomes(model) == {"routed", "dropout"}


@pytest.mark.parametrize("padding", ["none", "left"])
def test_compiled_models(padding):
    for make in (bert, llama):
        model, x = integration.replace(make(), "sblocal", 16), inputs(padding)
        tokens = x["attention_mask"].bool()
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager")
        torch.testing.assert_close(output(compiled, **x)[tokens], output(model, **x)[tokens], rtol=1e-4, atol=1e-4)


def test_autocast():
    model = integration.replace(llama(), "sblocal", 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert output(model, **inputs("left")).dtype == torch.bfloat16


def test_other_models_are_refused():
    with pytest.raises(UserError, match="Linear is no model of transformers"):
        integration.replace(nn.Linear(2, 2))
    config = transformers.XLNetConfig(vocab_size=50, d_model=32, n_layer=1, n_head=2, d_inner=32)
    model = transformers.XLNetModel(config)
    before = dict(vars(model.config))
    with pytest.raises(UserError, match="XLNetModel computes attention in its own code"):
        integration.replace(model)
    assert vars(model.config) == before
    assert not [name for name in vars(model) if "scatterbrain" in name]


@needs_notes
def test_the_example_of_the_page(capsys):
    page = (Path(__file__).parents[3] / "docs" / "use_in_your_model.md").read_text()
    (body,) = [each for each in re.findall(r"```py\n(.*?)```", page, re.DOTALL) if "transformers import" in each]
    exec(compile(body, "use_in_your_model.md", "exec"), {})
    assert capsys.readouterr().out.strip() == re.search(r"print\(report\(model\)\)  # (.*)", body)[1]
