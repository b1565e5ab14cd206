"""Losses as plain functions of tensors; the objectives weigh and add them."""
