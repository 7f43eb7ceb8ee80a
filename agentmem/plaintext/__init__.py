"""Plaintext memory: records (SQLite), their vectors (FAISS), embedding and search."""
