//! MoE gating and routing.
//!
//! Symbols: `t` tokens, `k` experts chosen per token (`num_topk`), `e` experts; `-1` means "no expert", "no row" or "padding".

pub mod get_fused_mapping;
pub mod topk_gate;
