//! MoE gating and routing.
//!
//! Symbols: `t` tokens, `k` experts chosen per token (`num_topk`), `e` experts, `p` rows of the expanded buffer; `-1` means "no expert", "no row" or "padding".

mod common_expanded;
pub mod expand_to_fused;
pub mod get_fused_mapping;
pub mod reduce_fused;
pub mod topk_gate;
