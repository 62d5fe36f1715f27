//! MoE gating and routing.
//!
//! Symbols: `t` tokens, `k` experts chosen per token (`num_topk`), `e` experts, `p` rows of the expanded buffer; `-1` means "no expert", "no row" or "padding".

pub mod aux_fi;
pub(crate) mod common_count;
pub mod common_expanded;
pub mod common_gate;
pub(crate) mod common_index;
pub mod expand_to_fused;
pub mod get_fused_mapping;
pub mod group_count;
pub mod inplace_unique_group_indices;
pub mod mask_indices_by_tp;
pub mod moe_topk_gate_backward;
pub mod moe_topk_gate_forward;
pub mod normalize_weight;
pub mod reduce_fused;
pub mod reduce_fused_backward;
pub mod top2_sum_gate;
pub mod topk_gate;
pub mod topk_sum_and_topk_group_idx;
