"""The tokenizer service: a recording to linguistic and semantic codes, a speaker embedding and a prompt mel."""
