//! Maps between tokens and rows of the expanded buffer, as data for the ops that use them.

use crate::support::cases::MoeCase;
use crate::support::golden::{Case, Golden};
use crate::support::suite::text;
use ferrotile::{Buffer, Device, TensorRef};

/// The maps on the host.
#[derive(Clone, Debug)]
pub struct Maps {
    /// Tokens.
    pub t: u64,
    /// Choices of a token.
    pub k: u64,
    /// Rows of the expanded buffer.
    pub p: u64,
    /// Row of each choice, -1 for none.
    pub token_topk_to_pos: Vec<i32>,
    /// Expert of each row, -1 for padding.
    pub pos_to_expert: Vec<i32>,
    /// Token of each row, -1 for padding.
    pub pos_to_token: Vec<i32>,
}

impl Maps {
    /// What rank 0 has, each expert's rows a multiple of `alignment`, and `tail` rows of padding after the last one.
    pub fn of_moe(case: &MoeCase, alignment: u64, tail: u64) -> Self {
        let topk_idx = case.topk_idx();
        let k = case.num_topk;
        let t = topk_idx.len() as u64 / k;
        let mut maps =
            Self { t, k, p: 0, token_topk_to_pos: vec![-1; topk_idx.len()], pos_to_expert: vec![], pos_to_token: vec![] };
        // Choices by expert, stable.
        let mut order: Vec<usize> = (0..topk_idx.len()).filter(|slot| topk_idx[*slot] >= 0).collect();
        order.sort_by_key(|slot| topk_idx[*slot]);
        for same in order.chunk_by(|a, b| topk_idx[*a] == topk_idx[*b]) {
            for slot in same {
                maps.token_topk_to_pos[*slot] = maps.pos_to_expert.len() as i32;
                maps.pos_to_expert.push(topk_idx[*slot] as i32);
                maps.pos_to_token.push((*slot as u64 / k) as i32);
            }
            maps.pad(maps.pos_to_expert.len().next_multiple_of(alignment as usize));
        }
        maps.pad(maps.pos_to_expert.len() + tail as usize);
        maps
    }

    fn pad(&mut self, rows: usize) {
        self.pos_to_expert.resize(rows, -1);
        self.pos_to_token.resize(rows, -1);
        self.p = rows as u64;
    }

    /// The recorded ones.
    pub fn of_golden(golden: &Golden, case: &Case) -> Result<Self, String> {
        let tensor = |name: &str| golden.tensor(case, &format!("in/{name}"));
        let positions = tensor("token_topk_to_pos")?;
        let pos_to_expert: Vec<i32> = tensor("pos_to_expert")?.to_vec()?;
        Ok(Self {
            t: positions.shape[0],
            k: positions.shape[1],
            p: pos_to_expert.len() as u64,
            token_topk_to_pos: positions.to_vec()?,
            pos_to_expert,
            pos_to_token: tensor("pos_to_token")?.to_vec()?,
        })
    }

    /// The token of each row by the choices alone: `None` for rows that no choice names.
    pub fn sources(&self) -> Vec<Option<usize>> {
        let mut sources = vec![None; self.p as usize];
        for (slot, row) in self.token_topk_to_pos.iter().enumerate() {
            if let Ok(row) = usize::try_from(*row) {
                sources[row] = Some(slot / self.k as usize);
            }
        }
        sources
    }

    /// Choices that have a row.
    pub fn num_used(&self) -> u64 {
        self.token_topk_to_pos.iter().filter(|row| **row >= 0).count() as u64
    }
}

/// The maps on a device.
pub struct DeviceMaps {
    t: u64,
    k: u64,
    p: u64,
    token_topk_to_pos: Buffer<i32>,
    pos_to_expert: Buffer<i32>,
    pos_to_token: Buffer<i32>,
}

impl DeviceMaps {
    /// Copies.
    pub fn new(device: &Device, maps: &Maps) -> Result<Self, String> {
        let upload = |values: &[i32]| device.upload(values).map_err(text);
        Ok(Self {
            t: maps.t,
            k: maps.k,
            p: maps.p,
            token_topk_to_pos: upload(&maps.token_topk_to_pos)?,
            pos_to_expert: upload(&maps.pos_to_expert)?,
            pos_to_token: upload(&maps.pos_to_token)?,
        })
    }

    /// Row of each choice.
    pub fn token_topk_to_pos(&self) -> ferrotile::Result<TensorRef<'_>> {
        self.token_topk_to_pos.tensor(&[self.t, self.k])
    }

    /// Expert of each row.
    pub fn pos_to_expert(&self) -> ferrotile::Result<TensorRef<'_>> {
        self.pos_to_expert.tensor(&[self.p])
    }

    /// Token of each row.
    pub fn pos_to_token(&self) -> ferrotile::Result<TensorRef<'_>> {
        self.pos_to_token.tensor(&[self.p])
    }
}
