//! The passes of [`super::passes`] through libtorch's operators, for devices other than the CPU: a block of points
//! at a time with all entries, so that no tensor is as large as points × entries.

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use super::cells::Vector;
use super::clustering::{Passes, Sums};

/// Numbers of the largest tensor of a block.
const LARGEST: i64 = 1 << 24;

/// Points, `[n, D]` f32, and what goes with them: a gradient, or the soft points.
pub struct Operators<const D: usize> {
    points: Tensor,
    carried: Tensor,
    /// Of the weight, and the points that follow each other.
    shape: Vec<i64>,
    inner: i64,
    tau: f64,
}

/// Entries `[K, D]`, f32.
fn tensor<const D: usize>(entries: &[Vector<D>], device: Device) -> Result<Tensor> {
    let numbers: Vec<f32> = entries.iter().flatten().map(|&x| x as f32).collect();
    Ok(Tensor::f_from_slice(&numbers)?.f_view([-1, D as i64])?.f_to_device(device)?)
}

/// Rows of D numbers.
fn vectors<const D: usize>(tensor: &Tensor) -> Result<Vec<Vector<D>>> {
    let numbers = Vec::<f64>::try_from(tensor.f_to_device(Device::Cpu)?.f_to_kind(Kind::Double)?.f_view(-1)?)?;
    Ok(numbers.chunks_exact(D).map(|row| std::array::from_fn(|d| row[d])).collect())
}

/// Over the points of a block, in f64.
fn total(rows: &Tensor) -> Result<Tensor> {
    Ok(rows.f_sum_dim_intlist(0i64, false, Kind::Double)?)
}

impl<const D: usize> Operators<D> {
    /// The points of a contiguous weight; nothing is carried yet.
    ///
    /// # Errors
    /// libtorch's (no memory).
    pub fn new(weight: &Tensor, inner: usize, tau: f64) -> Result<Self> {
        let mut new =
            Self { points: Tensor::new(), carried: Tensor::new(), shape: weight.size(), inner: inner as i64, tau };
        new.points = new.rows(weight)?;
        new.carried = new.points.f_zeros_like()?;
        Ok(new)
    }

    fn rows(&self, weight: &Tensor) -> Result<Tensor> {
        let planes = weight.f_view([-1, D as i64, self.inner])?;
        Ok(planes.f_transpose(1, 2)?.f_contiguous()?.f_view([-1, D as i64])?)
    }

    /// Makes points carry something of the weight's shape.
    ///
    /// # Errors
    /// When it has another.
    pub fn carry(&mut self, values: &Tensor) -> Result<()> {
        self.carried = self.rows(values)?;
        Ok(())
    }

    /// What points carry, in the weight's shape.
    ///
    /// # Errors
    /// libtorch's (no memory).
    pub fn carried(&self) -> Result<Tensor> {
        let planes = self.carried.f_view([-1, self.inner, D as i64])?;
        Ok(planes.f_transpose(1, 2)?.f_contiguous()?.f_view(self.shape.as_slice())?)
    }

    /// Shows `each` the points of every block, `[b, D]`, what they carry, and their attention to `entries`, `[b, K]`.
    fn blocks(
        &self,
        entries: &Tensor,
        mut each: impl FnMut(&Tensor, &mut Tensor, &Tensor) -> Result<()>,
    ) -> Result<()> {
        let (count, size) = (self.points.size()[0], (LARGEST / entries.numel().max(1) as i64).max(1));
        for start in (0..count).step_by(size as usize) {
            let part = |t: &Tensor| t.f_narrow(0, start, size.min(count - start));
            let (points, mut carried) = (part(&self.points)?, part(&self.carried)?);
            let away =
                points.f_unsqueeze(1)?.f_sub(entries)?.f_square()?.f_sum_dim_intlist(2i64, false, Kind::Float)?;
            let attention = away.f_mul_scalar(-1.0 / self.tau)?.f_softmax(1, Kind::Float)?;
            each(&points, &mut carried, &attention)?;
        }
        Ok(())
    }

    /// What slopes of logits do: adds (2/τ)·Σ_j slope_j·entry_j to what points carry, and returns, for each entry,
    /// (2/τ)·Σ slope·(point − entry).
    fn through(
        &self,
        attention: &Tensor,
        score: &Tensor,
        points: &Tensor,
        entries: &Tensor,
        carried: &mut Tensor,
    ) -> Result<Tensor> {
        let mean = attention.f_mul(score)?.f_sum_dim_intlist(1i64, true, Kind::Float)?;
        let slope = score.f_sub(&mean)?.f_mul(attention)?.f_mul_scalar(2.0 / self.tau)?;
        let _ = carried.f_add_(&slope.f_matmul(entries)?)?;
        let moment = slope.f_transpose(0, 1)?.f_matmul(points)?.f_to_kind(Kind::Double)?;
        let entries = entries.f_to_kind(Kind::Double)?;
        Ok(moment.f_sub(&entries.f_mul(&total(&slope)?.f_unsqueeze(1)?)?)?)
    }
}

impl<const D: usize> Passes<D> for Operators<D> {
    fn update(&mut self, entries: &[Vector<D>]) -> Result<Vec<Sums<D>>> {
        let device = self.points.device();
        let old = tensor(entries, device)?;
        let mut mass = Tensor::f_zeros([entries.len() as i64], (Kind::Double, device))?;
        let mut sum = Tensor::f_zeros([entries.len() as i64, D as i64], (Kind::Double, device))?;
        self.blocks(&old, |points, _, attention| {
            let _ = mass.f_add_(&total(attention)?)?;
            let _ = sum.f_add_(&attention.f_transpose(0, 1)?.f_matmul(points)?.f_to_kind(Kind::Double)?)?;
            Ok(())
        })?;
        let mass = Vec::<f64>::try_from(mass.f_to_device(Device::Cpu)?)?;
        let sums = mass.into_iter().zip(vectors::<D>(&sum)?).zip(entries);
        let from = |((weight, sum), entry): ((f64, Vector<D>), &Vector<D>)| {
            let moment = std::array::from_fn(|d| sum[d] - weight * entry[d]);
            Sums { weight, moment, other: [0.0; D] }
        };
        Ok(sums.map(from).collect())
    }

    fn read(&mut self, previous: &[Vector<D>], last: &[Vector<D>]) -> Result<f64> {
        let device = self.points.device();
        let last = tensor(last, device)?;
        let error = Tensor::f_zeros([], (Kind::Double, device))?;
        self.blocks(&tensor(previous, device)?, |points, carried, attention| {
            carried.f_copy_(&attention.f_matmul(&last)?)?;
            let away = points.f_unsqueeze(1)?.f_sub(&last)?.f_square()?.f_sum_dim_intlist(2i64, false, Kind::Float)?;
            let _ = error.shallow_clone().f_add_(&away.f_amin([1i64].as_slice(), false)?.f_sum(Kind::Double)?)?;
            Ok(())
        })?;
        Ok(error.f_double_value(&[])?)
    }

    fn read_back(&mut self, previous: &[Vector<D>], last: &[Vector<D>]) -> Result<Vec<[Vector<D>; 2]>> {
        let device = self.points.device();
        let (previous, last) = (tensor(previous, device)?, tensor(last, device)?);
        let zeros = Tensor::f_zeros(last.size(), (Kind::Double, device))?;
        let (mut to_last, mut to_previous) = (zeros.copy(), zeros);
        self.blocks(&previous, |points, carried, attention| {
            let upstream = carried.copy();
            let _ = to_last.f_add_(&attention.f_transpose(0, 1)?.f_matmul(&upstream)?.f_to_kind(Kind::Double)?)?;
            let score = upstream.f_matmul(&last.f_transpose(0, 1)?)?;
            let _ = carried.f_zero_()?;
            let _ = to_previous.f_add_(&self.through(attention, &score, points, &previous, carried)?)?;
            Ok(())
        })?;
        Ok(vectors(&to_last)?
            .into_iter()
            .zip(vectors(&to_previous)?)
            .map(|(last, previous)| [last, previous])
            .collect())
    }

    fn update_back(&mut self, share: &[Vector<D>], old: &[Vector<D>], new: &[Vector<D>]) -> Result<Vec<Vector<D>>> {
        let device = self.points.device();
        let constants: Vec<f32> =
            share.iter().zip(new).map(|(share, new)| -(0..D).map(|d| share[d] * new[d]).sum::<f64>() as f32).collect();
        let constants = Tensor::f_from_slice(&constants)?.f_to_device(device)?;
        let (share, old) = (tensor(share, device)?, tensor(old, device)?);
        let mut to_old = Tensor::f_zeros(old.size(), (Kind::Double, device))?;
        self.blocks(&old, |points, carried, attention| {
            let score = points.f_matmul(&share.f_transpose(0, 1)?)?.f_add(&constants)?;
            let _ = carried.f_add_(&attention.f_matmul(&share)?)?;
            let _ = to_old.f_add_(&self.through(attention, &score, points, &old, carried)?)?;
            Ok(())
        })?;
        vectors(&to_old)
    }
}
