"""Small random BLIP-2 folders with a language model of every kind, each with a tokenizer of that kind's habits.

    opt        byte-level, </s> before a text
    smollm     Llama layers, tied words; byte-level, names a first token and never puts it, has no pad
    llama      SentencePiece's pieces (the blank belongs to the word, bytes for what is unknown), <s> before a text, no pad
    qwen       Qwen2 layers with biases; byte-level, no first token at all
    pythia     GPT-NeoX layers, another name for each part
    flan-t5    encoder-decoder with gated GELU; SentencePiece's pieces, </s> behind a text, no line's end
"""

import json

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (AutoTokenizer, Blip2Config, Blip2ForConditionalGeneration, Blip2QFormerConfig, Blip2VisionConfig, GPTNeoXConfig,
                          LlamaConfig, OPTConfig, Qwen2Config, T5Config)

TEXTS = ["Question: What style is this painting? Answer: Pop Art\n", "Question: How many boats? Answer: three hundred and one\n",
         "Question: Colour? Answer: red Cubism Pointillism\n", "Context: A boat. Two large, old; it's a dog's."] * 3
W, Q, SIZE = 32, 4, 28
CAUSAL = ("opt", "smollm", "llama", "qwen", "pythia")
KINDS = (*CAUSAL, "flan-t5")


def byte_level(marks):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=340, special_tokens=marks, show_progress=False,
                                                             initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return tokenizer


def sentence_pieces(marks, model):
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer, tokenizer.decoder = (part.Metaspace(prepend_scheme="always") for part in (pre_tokenizers, decoders))
    if isinstance(model, models.Unigram):  # T5: blanks and line ends are one
        tokenizer.normalizer = normalizers.Sequence([normalizers.Nmt(), normalizers.Replace(Regex(" {2,}"), " ")])
        tokenizer.train_from_iterator(TEXTS, trainers.UnigramTrainer(vocab_size=120, special_tokens=marks, unk_token="<unk>",
                                                                     show_progress=False))
        # the trainer leaves pieces of the same score in another order each time: other words, with the same random weights
        pieces = [(piece, round(score, 3)) for piece, score in json.loads(tokenizer.to_str())["model"]["vocab"]]
        tokenizer.model = models.Unigram(pieces[:len(marks)] + sorted(pieces[len(marks):]), unk_id=marks.index("<unk>"))
        return tokenizer
    raw = [f"<0x{byte:02X}>" for byte in range(256)]  # Llama: a line's end is a byte
    texts = [text.replace("\n", " ") for text in TEXTS]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=400, special_tokens=[*marks, *raw], show_progress=False))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.pre_tokenizer = None
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])
    return tokenizer


def around(tokenizer, single):
    """Put the marks of a template around each text."""
    marks = [word for word in single.split() if word != "$A"]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=[(m, tokenizer.token_to_id(m)) for m in marks])
    return tokenizer


def tokenizer_of(kind):
    """-> (tokenizers.Tokenizer, content of tokenizer_config.json)."""
    if kind == "opt":
        return around(byte_level(["<s>", "<pad>", "</s>", "<unk>"]), "</s> $A"), {
            "bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "</s>"}
    if kind == "smollm":
        return byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]), {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    if kind == "qwen":
        return byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]), {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    if kind == "pythia":
        return byte_level(["<|endoftext|>", "<|padding|>"]), {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    if kind == "llama":
        bpe = models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True)
        return around(sentence_pieces(["<unk>", "<s>", "</s>"], bpe), "<s> $A"), {
            "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return around(sentence_pieces(["<pad>", "</s>", "<unk>"], models.Unigram()), "$A </s>"), {
        "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}


def text_config(kind, words, tokenizer):
    """The language model's config at two layers."""
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    common = {"vocab_size": words, "hidden_size": W, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 2 * W,
              "max_position_embeddings": 256, **ids}
    if kind == "opt":
        return OPTConfig(**{**common, "ffn_dim": 2 * W, "word_embed_proj_dim": W, "dropout": 0.0})
    if kind == "qwen":
        return Qwen2Config(**common, num_key_value_heads=2)
    if kind == "pythia":
        return GPTNeoXConfig(**common)
    if kind == "flan-t5":
        return T5Config(vocab_size=words, d_model=W, d_kv=8, d_ff=2 * W, num_layers=2, num_heads=4, dropout_rate=0.0,
                        feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=tokenizer.pad_token_id,
                        **{key: number for key, number in ids.items() if number is not None})
    return LlamaConfig(**common, num_key_value_heads=2 if kind == "smollm" else 4, tie_word_embeddings=kind == "smollm")


def make_folder(kind, folder):
    """The folder as save_pretrained of model and tokenizer writes it. Weights are large enough for answers to differ from each other."""
    folder.mkdir(parents=True)
    backend, settings = tokenizer_of(kind)
    backend.add_special_tokens([AddedToken("<image>", special=True)])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **settings}))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    vision = Blip2VisionConfig(hidden_size=W, intermediate_size=2 * W, num_hidden_layers=1, num_attention_heads=4, image_size=SIZE,
                               patch_size=14)
    qformer = Blip2QFormerConfig(vocab_size=64, hidden_size=W, num_hidden_layers=4, num_attention_heads=4, intermediate_size=2 * W,
                                 encoder_hidden_size=W, max_position_embeddings=32)
    config = Blip2Config(vision_config=vision.to_dict(), qformer_config=qformer.to_dict(),
                         text_config=text_config(kind, len(tokenizer), tokenizer).to_dict(), num_query_tokens=Q,
                         image_token_index=tokenizer.convert_tokens_to_ids("<image>"))
    torch.manual_seed(0)
    model = Blip2ForConditionalGeneration(config)
    if kind == "flan-t5":  # whose head has weights of its own; in a fresh model transformers 5 ties them whatever the config says
        model.language_model.lm_head.weight = nn.Parameter(torch.empty(len(tokenizer), W))
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.5)
    nn.init.normal_(model.query_tokens)
    head = model.language_model.get_output_embeddings()
    if head.weight is not model.language_model.get_input_embeddings().weight:
        nn.init.normal_(head.weight, std=0.1 if kind == "flan-t5" else 0.5)  # T5's attention is sharper, and 4 bits change it more
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if kind == "flan-t5":  # and the published config says so
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        settings["text_config"].pop("scale_decoder_outputs", None)
        settings["text_config"]["tie_word_embeddings"] = False
        (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    return str(folder)
