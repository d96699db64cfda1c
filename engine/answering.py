"""answering.py: greedy and beam search over the frozen language model, with the answers of transformers' own generate.

    search           answers of a batch of questions: greedy, or beam search
    record_steps     a step of the search as one CUDA graph
    Tree             a causal decoder's keys and values: the beams of a question share its prompt
    Rows             those of an encoder-decoder: a row a beam

Three things make it faster than generate. The prompt runs once and is kept once, whatever the number of beams. Choosing among the
beams moves no key of a causal decoder, only what each beam may see. Questions that are done leave the batch.

Capitals in shape comments: B questions that are still asked, N all of them, b beams, P tokens of a prompt, K places of keys (the
prompt's and then b for each step), D width, V vocabulary, n new tokens, C = (number of ends + 1) * b candidates.
"""

import torch
import torch.nn.functional as F

from engine import packing
from engine.errors import DataError

NEVER = -1e9  # a score that no text has
ROUND = 16  # prompts have a multiple of so many tokens where steps are recorded, so that a few recordings serve all batches
LEAVE = 0.25  # share of the batch that must be done before it is made smaller, which copies the keys of those that stay


def search(state, beams, new_tokens, stops, pad, length_penalty=0.0, best=1):
    """The `best` likeliest texts of each question, likeliest first -> ids [N*best,n], pads behind an end.

    state: Tree or Rows; stops: list of ids that end a text (never the first token); pad: id."""
    logits = state.start()  # [N,V]
    ends = torch.tensor(stops, device=logits.device)
    found = torch.full((len(logits), best, new_tokens), pad, device=logits.device)
    hold = Beams(len(logits), beams, new_tokens, pad, ends, length_penalty) if beams > 1 else Greedy(len(logits), new_tokens, pad, ends)
    asked = torch.arange(len(logits), device=logits.device)  # [B], which questions are still in the batch
    for n in range(new_tokens):
        logits = logits.view(len(asked), -1, logits.shape[-1]).float()  # [B,1 or b,V]
        tokens, parents = hold.extend(logits, n)  # [B,b] each
        done = ~hold.open
        left = int(done.sum())
        if left == len(asked) or n + 1 == new_tokens:
            break
        state.choose(parents)
        if left >= LEAVE * len(asked) and not state.fixed:
            found[asked[done]] = hold.texts(best)[done]
            stay = (~done).nonzero()[:, 0]
            asked, tokens = asked[stay], tokens[stay]
            hold.keep(stay), state.keep(stay)
        logits = state.step(tokens)  # [B*b,V]
    found[asked] = hold.texts(best)
    return found[:, :, :n + 1].flatten(0, 1)


class Greedy:
    """The likeliest token at each step. `open` [B]: the questions whose text has no end yet."""

    def __init__(self, questions, new_tokens, pad, ends):
        self.ids = torch.full((questions, 1, new_tokens), pad, device=ends.device)
        self.open = torch.ones(questions, dtype=torch.bool, device=ends.device)
        self.pad, self.ends = pad, ends

    def extend(self, logits, n):
        """logits [B,1,V] of token n -> tokens [B,1] and whose continuations they are, [B,1]."""
        if n == 0:
            logits[..., self.ends] = -torch.inf
        tokens = logits.argmax(-1).masked_fill(~self.open[:, None], self.pad)  # [B,1]
        self.ids[:, :, n] = tokens
        self.open &= ~torch.isin(tokens[:, 0], self.ends)
        return tokens, torch.zeros_like(tokens)

    def texts(self, best):
        return self.ids

    def keep(self, rows):
        self.ids, self.open = self.ids[rows], self.open[rows]


class Beams:
    """Beam search to the arithmetic of transformers' `_beam_search` (early_stopping False). `open` [B]: the questions whose b ended
    texts a running one may still beat."""

    def __init__(self, questions, beams, new_tokens, pad, ends, length_penalty):
        self.ids = torch.full((questions, beams, new_tokens), pad, device=ends.device)  # of the texts that go on
        self.scores = torch.zeros(questions, 1, device=ends.device)  # [B,1] at first, then [B,b]
        self.ended = self.ids.clone()
        self.ended_scores = torch.full((questions, beams), NEVER, device=ends.device)
        self.has_ended = torch.zeros(questions, beams, dtype=torch.bool, device=ends.device)
        self.open = torch.ones(questions, dtype=torch.bool, device=ends.device)
        self.beams, self.ends, self.length_penalty = beams, ends, length_penalty

    def extend(self, logits, n):
        """logits [B,1 or b,V] of token n -> tokens [B,b] of the texts that go on, and which of the beams before each continues."""
        scores = logits.log_softmax(-1)  # [B,1 or b,V]
        if n == 0:  # of what is left of the probability, not made up to one: a length penalty sees the difference
            scores[..., self.ends] = -torch.inf
        scores = (scores + self.scores[..., None]).flatten(1)  # [B,b*V]
        scores, places = scores.topk((1 + max(1, len(self.ends))) * self.beams)  # [B,C]: even if the best b all end, b go on
        parents, tokens = places // logits.shape[-1], places % logits.shape[-1]
        candidates = self.ids.gather(1, parents[..., None].expand(-1, -1, self.ids.shape[-1]))  # [B,C,n]
        candidates[:, :, n] = tokens
        stopped = torch.isin(tokens, self.ends) | (n + 1 == self.ids.shape[-1])  # [B,C]
        self._end(candidates, scores, stopped, n)
        self.scores, going = (scores + stopped * NEVER).topk(self.beams)  # [B,b]
        self.ids = _picked(candidates, going)
        possible = self.scores[:, 0] / (n + 1) ** self.length_penalty
        self.open &= possible > torch.where(self.has_ended, self.ended_scores.amin(1, keepdim=True), NEVER).amin(1)
        return tokens.gather(1, going), parents.gather(1, going)

    def _end(self, candidates, scores, stopped, n):
        """Keep the best b of the texts that ended before or now; only the first b candidates count as ended."""
        stopped = stopped & (torch.arange(stopped.shape[1], device=stopped.device) < self.beams)
        scores = scores / (n + 1) ** self.length_penalty + ~self.open[:, None] * NEVER + ~stopped * NEVER
        self.ended_scores, best = torch.cat([self.ended_scores, scores], 1).topk(self.beams)  # [B,b] of [B,b+C]
        self.ended = _picked(torch.cat([self.ended, candidates], 1), best)
        self.has_ended = torch.cat([self.has_ended, stopped], 1).gather(1, best)

    def texts(self, best):
        return self.ended[:, :best]

    def keep(self, rows):
        for name in ("ids", "scores", "ended", "ended_scores", "has_ended", "open"):
            setattr(self, name, getattr(self, name)[rows])


def _picked(texts, numbers):
    """texts [B,any,n], numbers [B,b] -> [B,b,n]."""
    return texts.gather(1, numbers[..., None].expand(-1, -1, texts.shape[-1]))


# --- what the language model remembers ------------

class Tree:
    """The b beams of a question are b places of one row, at the same position each: all see the prompt's keys, which are there once, and
    of the later ones those of their own ancestors. A step has the same shapes as every other, but for who is left in the batch."""

    def __init__(self, decoder, inputs, beams, new_tokens):
        """inputs: inputs_embeds [B,P,D] and attention_mask [B,P]."""
        self.decoder, self.beams, self.steps = decoder, beams, new_tokens - 1
        self.recorded = getattr(decoder.language_model, "recorded_steps", None)
        self.fixed = self.recorded is not None and new_tokens > 1  # nobody leaves: a recording is of one size
        short = -inputs["attention_mask"].shape[1] % ROUND if self.fixed else 0
        mask, embeds = inputs["attention_mask"], inputs["inputs_embeds"]
        order = mask.argsort(dim=1, descending=True, stable=True)  # [B,P]: pads go to the right, where no token of the prompt looks
        self.embeds = F.pad(embeds.gather(1, order[..., None].expand_as(embeds)), (0, 0, 0, short))
        self.mask = F.pad(mask.gather(1, order), (0, short))
        self.next = self.mask.sum(1, keepdim=True)  # [B,1], the position of the next token
        self.prompt = self.mask.shape[1]
        self.seen = F.pad(self.mask.bool(), (0, beams * self.steps))[:, None].repeat(1, beams, 1)  # [B,b,K]
        self.places = torch.arange(self.prompt, self.prompt + beams, device=self.mask.device)  # [b], where this step's keys go

    def start(self):
        """-> logits [B,V] of the first token."""
        states, cache = self._read()
        self.embeds = self.mask = None
        self.cache = with_room(cache, self.beams * self.steps, self.places)
        if self.fixed:
            self.forward = _recording(self.recorded, self)
        last = states.gather(1, (self.next - 1)[..., None].expand(-1, 1, states.shape[-1]))  # [B,1,D]
        return self.decoder.head(last[:, 0])

    def _read(self):
        """-> the prompts' states [B,P,D], DynamicCache of their keys and values [B,heads,P,D/heads]; without pads where training is."""
        from transformers import DynamicCache
        cache, body = DynamicCache(), self.decoder.body
        if self.decoder.language_model.config._attn_implementation != packing.NAME:
            places = torch.arange(self.prompt, device=self.mask.device)[None]
            return body(inputs_embeds=self.embeds, position_ids=places, **self.decoder.with_cache(cache)).last_hidden_state, cache
        packed = packing.Packing.of(self.mask)
        states = packed.run(body, self.embeds, **self.decoder.with_cache(cache))
        for layer in cache.layers:
            layer.keys, layer.values = (packed.unpack(x.transpose(1, 2)).transpose(1, 2) for x in (layer.keys, layer.values))
        return states, cache

    def step(self, tokens):
        """tokens [B,b] -> logits [B,b,V]."""
        self.seen[:, :, self.places] = torch.eye(self.beams, dtype=torch.bool, device=tokens.device)
        logits = self.forward(tokens, self.seen, self.next, self.places)
        self.places += self.beams  # in place: the cache looks at it
        self.next = self.next + 1
        return logits

    def forward(self, tokens, seen, position, places):
        """tokens [B,b], seen [B,b,K], position [B,1], places [b] (which the cache holds too) -> logits [B,b,V]."""
        dtype = self.decoder.language_model.get_input_embeddings().weight.dtype
        hidden = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)
        states = self.decoder.body(input_ids=tokens, attention_mask=hidden[:, None], position_ids=position.expand(-1, self.beams),
                                   **self.decoder.with_cache(self.cache)).last_hidden_state  # [B,b,D]
        return self.decoder.head(states)

    def choose(self, parents):
        """parents [B,b]: the beam that each of the next ones continues."""
        self.seen = _picked(self.seen, parents)

    def keep(self, rows):
        self.seen, self.next = self.seen[rows], self.next[rows]
        self.cache.batch_select_indices(rows)


def record_steps(language_model):
    """Answer with each step of the search as one CUDA graph from now on: a GPU gets it in one command and not in hundreds.

    DataError: not on a GPU."""
    if language_model.get_input_embeddings().weight.device.type != "cuda":
        raise DataError("--graphs records steps for a GPU, and the model is on none: leave it out")
    language_model.recorded_steps = {}


class Recording:
    """A function of tensors as a CUDA graph: it computes where it was recorded, so inputs are copied there."""

    def __init__(self, function, inputs):
        self.inputs = inputs
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            function(*inputs)  # libraries choose their kernels and take their memory now
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.output = function(*inputs)

    def __call__(self, *inputs):
        for held, x in zip(self.inputs, inputs):
            held.copy_(x)
        self.graph.replay()
        return self.output


def _recording(recorded, tree):
    """The forward of an earlier Tree of the same shapes, whose keys become this one's; else this one's, recorded.

    One is kept: batches come sorted by length, so that its shapes change seldom."""
    key = (*tree.seen.shape, tree.prompt, tree.cache.layers[0].keys.dtype)
    if key not in recorded:
        recorded.clear()
        inputs = [torch.zeros(tree.seen.shape[:2], dtype=torch.long, device=tree.seen.device), tree.seen.clone(), tree.next.clone(),
                  tree.places]
        recorded[key] = tree.cache, Recording(tree.forward, inputs)
    cache, recording = recorded[key]
    for held, own in zip(cache.layers, tree.cache.layers):
        held.keys.copy_(own.keys), held.values.copy_(own.values)
    tree.cache = cache
    return recording


def with_room(cache, places, now):
    """A DynamicCache of keys [B,heads,P,D/heads] -> one of [B,heads,P+places,D/heads], whose update writes at the places `now` (a
    tensor, read at each update) and returns all of it."""
    from transformers.cache_utils import DynamicLayer

    class RoomLayer(DynamicLayer):
        def __init__(self, layer):
            super().__init__()
            self.keys, self.values = (F.pad(x, (0, 0, 0, places)) for x in (layer.keys, layer.values))
            self.dtype, self.device, self.is_initialized = layer.keys.dtype, layer.keys.device, True

        def update(self, key_states, value_states, *args, **kwargs):
            self.keys.index_copy_(2, now, key_states)
            self.values.index_copy_(2, now, value_states)
            return self.keys, self.values

    for number, layer in enumerate(cache.layers):
        cache.layers[number] = RoomLayer(layer)
    return cache


class Rows:
    """An encoder-decoder: each beam is a row with its own keys; those of the encoder are copied once and never moved."""
    fixed = False

    def __init__(self, decoder, encoded, mask, beams):
        """encoded [B,P,D], mask [B,P]."""
        self.decoder, self.encoded, self.mask, self.beams = decoder, encoded, mask, beams

    def start(self):
        """-> logits [B,V] of the first token."""
        from transformers import DynamicCache, EncoderDecoderCache
        self.cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        first = self.mask.new_full((len(self.mask), 1), self.decoder.language_model.config.decoder_start_token_id)
        logits = self._run(first)
        self.cache.batch_repeat_interleave(self.beams)
        self.encoded, self.mask = (x.repeat_interleave(self.beams, 0) for x in (self.encoded, self.mask))  # [B*b,...]
        return logits

    def step(self, tokens):
        """tokens [B,b] -> logits [B*b,V]."""
        return self._run(tokens.reshape(-1, 1))

    def _run(self, tokens):
        from transformers.modeling_outputs import BaseModelOutput
        out = self.decoder.language_model(encoder_outputs=BaseModelOutput(self.encoded), attention_mask=self.mask, use_cache=True,
                                          decoder_input_ids=tokens, **self.decoder.with_cache(self.cache))
        return out.logits[:, -1]

    def choose(self, parents):
        """See Tree."""
        self.cache.self_attention_cache.batch_select_indices(self._flat(torch.arange(len(parents), device=parents.device), parents))

    def keep(self, rows):
        flat = self._flat(rows, torch.arange(self.beams, device=rows.device).expand(len(rows), -1))
        self.cache.batch_select_indices(flat)
        self.encoded, self.mask = self.encoded[flat], self.mask[flat]

    def _flat(self, rows, beams):
        """Questions [B], beams [B,b] of each -> their rows [B*b]."""
        return (rows[:, None] * self.beams + beams).flatten()
