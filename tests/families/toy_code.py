"""A model that transformers does not know: its own layout, its attention module two levels down, layers in `blocks`."""

import torch
from torch import nn
from torch.nn import functional
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


class ToyConfig(PretrainedConfig):
    model_type = "toy_sparse"

    def __init__(self, vocab_size=300, hidden_size=32, num_hidden_layers=4, index_topk=8, twist="", **kwargs):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = 2
        self.max_position_embeddings = 512
        self.index_topk = index_topk
        self.twist = twist
        super().__init__(**kwargs)


class Chooser(nn.Module):
    """Each query's best tokens by one dot product."""

    def __init__(self, config):
        super().__init__()
        self.q = nn.Linear(config.hidden_size, 16, bias=False)
        self.k = nn.Linear(config.hidden_size, 16, bias=False)
        if config.twist == "silent":
            self.width = config.index_topk
        else:
            self.index_topk = config.index_topk
        self.topk = config.index_topk
        self.twist = config.twist

    def forward(self, states):
        return self.choose(states)

    def choose(self, states):
        scores = self.q(states) @ self.k(states).transpose(1, 2)
        future = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
        chosen = scores.masked_fill(future, float("-inf")).topk(self.topk, dim=-1).indices
        others = {"scores beside": (scores, chosen), "two selections": (chosen, chosen)}
        return others.get(self.twist, chosen)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.indexer = Chooser(config)
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.twist = config.twist

    def forward(self, states):
        chosen = self.indexer.choose(states) if self.twist == "past the call" else self.indexer(states)
        if self.twist in ("scores beside", "two selections"):
            _, chosen = chosen
        q, k, v = self.qkv(states).chunk(3, dim=-1)
        mask = torch.zeros(*states.shape[:2], states.shape[1], dtype=torch.bool).scatter(-1, chosen, True).tril()
        return self.o_proj(functional.scaled_dot_product_attention(q, k, v, mask))


class Mixer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.inner = Attention(config)

    def forward(self, states):
        return self.inner(states)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm = nn.RMSNorm(config.hidden_size)
        self.mixer = Mixer(config)
        if config.twist == "twice":
            self.second = Mixer(config)

    def forward(self, hidden_states, position_ids, more=0):
        return hidden_states + self.mixer(self.norm(hidden_states)) + more


class ToyModel(PreTrainedModel):
    config_class = ToyConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.RMSNorm(config.hidden_size)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, use_cache=None, **kwargs):
        states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        positions = torch.arange(states.shape[1]).unsqueeze(0)
        twist, embedded = self.config.twist, states
        more = {"first states": embedded, "renamed ids": (input_ids % 7).unsqueeze(-1)}.get(twist, 0)
        orders = {"backwards": self.blocks[::-1], "fewer": self.blocks[:-1], "again": [*self.blocks, *self.blocks]}
        for block in orders.get(twist, self.blocks):
            states = block(hidden_states=states, position_ids=positions, more=more)
            if twist == "fading":
                states = states * 0.5
        states = self.norm(states)
        if self.config.twist == "louder":
            states = states * 1.5
        return BaseModelOutputWithPast(last_hidden_state=states)


class ToyForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = ToyConfig
    base_model_prefix = "model"

    def __init__(self, config):
        super().__init__(config)
        self.model = ToyModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids=None, inputs_embeds=None, use_cache=None, **kwargs):
        states = self.model(input_ids=input_ids, inputs_embeds=inputs_embeds).last_hidden_state
        return CausalLMOutputWithPast(logits=self.lm_head(states))
