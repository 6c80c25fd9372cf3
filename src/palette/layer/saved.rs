//! Numbers of a layer in a saved state.

use anyhow::{Context, Result, ensure};
use tch::{Device, Kind};

use crate::ops::Weights;

/// The numbers that a saved state has under a name.
pub fn saved(tensors: &Weights, name: &str, part: &str, length: usize) -> Result<Vec<f64>> {
    let key = format!("{name}.{part}");
    let tensor = tensors.get(&key).with_context(|| format!("the saved state lacks `{key}`"))?;
    ensure!(
        tensor.f_kind()? == Kind::Double && tensor.size() == [length as i64],
        "`{key}` in the saved state is {:?} of shape {:?}, and Double of shape [{length}] is expected",
        tensor.f_kind()?,
        tensor.size()
    );
    Ok(Vec::<f64>::try_from(tensor.f_to_device(Device::Cpu)?)?)
}
