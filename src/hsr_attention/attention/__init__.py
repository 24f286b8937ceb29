"""Attention over reported keys: softmax, ReLU, the certificate, and the float64 reference."""
