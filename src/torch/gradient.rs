//! Steps of the backward pass that are computed here, and gradients within such a step.

use std::ffi::{CString, c_char, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};

use anyhow::{Result, anyhow, ensure};
use tch::Tensor;
use torch_sys::C_tensor;

use super::told;

/// One gradient an input; `None` where there is none.
pub type Gradients = Vec<Option<Tensor>>;

type Backward = dyn Fn(&Tensor) -> Result<Gradients> + Send;

unsafe extern "C" {
    fn palettist_custom_gradient(
        value: *const C_tensor,
        inputs: *const *mut C_tensor,
        count: usize,
        closure: *mut c_void,
        backward: unsafe extern "C" fn(*mut c_void, *const C_tensor, *mut *mut C_tensor, usize) -> *mut c_char,
        drop: unsafe extern "C" fn(*mut c_void),
        output: *mut *mut C_tensor,
    ) -> *mut c_char;
    fn palettist_gradients(
        value: *const C_tensor,
        upstream: *const C_tensor,
        variables: *const *mut C_tensor,
        count: usize,
        gradients: *mut *mut C_tensor,
    ) -> *mut c_char;
    fn strdup(text: *const c_char) -> *mut c_char;
}

/// `value`, computed from `inputs` without gradients, as a value that has some: `backward` turns its gradient into
/// theirs. It is called at most once for each backward pass, perhaps on another thread, and dropped when no other pass
/// can come. Where gradients are off, or no input asks for one, this is `value` alone.
///
/// # Errors
/// libtorch's message.
pub fn custom(
    value: &Tensor,
    inputs: &[&Tensor],
    backward: impl Fn(&Tensor) -> Result<Gradients> + Send + 'static,
) -> Result<Tensor> {
    let pointers = pointers(inputs);
    let closure: Box<Box<Backward>> = Box::new(Box::new(backward));
    let mut output = std::ptr::null_mut();
    // SAFETY: the pointers outlive the call. The closure is given away: C++ drops it once, by `drop_closure`, and calls
    // it by `call_closure`, under a lock, only before that.
    let message = unsafe {
        palettist_custom_gradient(
            value.as_ptr(),
            pointers.as_ptr(),
            pointers.len(),
            Box::into_raw(closure) as *mut c_void,
            call_closure,
            drop_closure,
            &mut output,
        )
    };
    told(message).map_err(|text| anyhow!("libtorch, at a step of the backward pass: {text}"))?;
    // SAFETY: without a message there is a new at::Tensor that nobody else owns.
    Ok(unsafe { Tensor::from_ptr(output) })
}

/// The gradients of `variables` when `upstream` is that of `value`. The graph behind `value` is freed.
///
/// # Errors
/// libtorch's message, or that of a [`custom`] step.
pub fn of(value: &Tensor, upstream: &Tensor, variables: &[&Tensor]) -> Result<Gradients> {
    let pointers = pointers(variables);
    let mut gradients = vec![std::ptr::null_mut(); pointers.len()];
    // SAFETY: the pointers outlive the call, and there is room for one gradient a variable.
    let message = unsafe {
        palettist_gradients(
            value.as_ptr(),
            upstream.as_ptr(),
            pointers.as_ptr(),
            pointers.len(),
            gradients.as_mut_ptr(),
        )
    };
    // SAFETY: what was written is a new at::Tensor that nobody else owns.
    let gradients = gradients.into_iter().map(|p| (!p.is_null()).then(|| unsafe { Tensor::from_ptr(p) })).collect();
    told(message).map_err(|text| anyhow!("{text}"))?;
    Ok(gradients)
}

fn pointers(tensors: &[&Tensor]) -> Vec<*mut C_tensor> {
    tensors.iter().map(|tensor| tensor.as_ptr() as *mut _).collect()
}

/// Runs the closure; neither an error nor a panic goes further than a message.
unsafe extern "C" fn call_closure(
    closure: *mut c_void,
    upstream: *const C_tensor,
    gradients: *mut *mut C_tensor,
    count: usize,
) -> *mut c_char {
    let run = || {
        // SAFETY: `closure` is what `custom` gave away and has not been dropped; `upstream` lives as long as this call.
        let (backward, upstream) =
            unsafe { (&*(closure as *const Box<Backward>), Tensor::clone_from_ptr(upstream as *mut _)) };
        let found = backward(&upstream)?;
        ensure!(found.len() == count, "{} gradients for {count} inputs", found.len());
        for (place, gradient) in found.into_iter().enumerate() {
            if let Some(mut gradient) = gradient {
                // SAFETY: `gradients` has room for `count`; the tensor is given away, not dropped.
                unsafe { *gradients.add(place) = gradient.as_mut_ptr() };
                std::mem::forget(gradient);
            }
        }
        Ok(())
    };
    let message = match catch_unwind(AssertUnwindSafe(run)) {
        Ok(Ok(())) => return std::ptr::null_mut(),
        Ok(Err(error)) => format!("{error:#}"),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("a panic").to_owned()
        }
    };
    let message = CString::new(message.replace('\0', " ")).unwrap_or_default();
    // SAFETY: a C string; the copy is the caller's to free.
    unsafe { strdup(message.as_ptr()) }
}

unsafe extern "C" fn drop_closure(closure: *mut c_void) {
    // SAFETY: the pointer that `custom` gave away; C++ gives it back once.
    let closure = unsafe { Box::from_raw(closure as *mut Box<Backward>) };
    // Dropping tensors does not panic; if it ever did, C++ must not see it.
    let _ = catch_unwind(AssertUnwindSafe(|| drop(closure)));
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use anyhow::bail;

    use super::*;

    fn leaf(values: &[f32]) -> Tensor {
        Tensor::from_slice(values).set_requires_grad(true)
    }

    #[test]
    fn the_closure_makes_the_gradient_and_is_dropped_once() {
        let (x, unused) = (leaf(&[1.0, 2.0]), leaf(&[5.0]));
        let alive = Arc::new(());
        let held = alive.clone();
        let doubled = tch::no_grad(|| &x * 2.0);
        let y = custom(&doubled, &[&x, &unused], move |upstream| {
            let _held = &held;
            Ok(vec![Some(upstream * 2.0), None])
        })
        .unwrap();
        assert_eq!(Arc::strong_count(&alive), 2);
        (&y * &y).sum(tch::Kind::Float).backward();
        // d(4x²) = 8x.
        assert!(x.grad().equal(&Tensor::from_slice(&[8f32, 16.0])));
        assert!(!unused.grad().defined());
        assert_eq!(Arc::strong_count(&alive), 1, "dropped with the pass");
        let again = (&y * 1.0).sum(tch::Kind::Float).f_backward().unwrap_err().to_string();
        assert!(again.contains("a second backward pass"), "{again}");
    }

    #[test]
    fn a_graph_that_is_never_used_drops_its_closure() {
        let x = leaf(&[1.0]);
        let alive = Arc::new(());
        let make = |x: &Tensor| {
            let held = alive.clone();
            custom(&x.detach(), &[x], move |upstream| {
                let _held = &held;
                Ok(vec![Some(upstream.shallow_clone())])
            })
            .unwrap()
        };
        let y = make(&x);
        assert!(y.requires_grad() && Arc::strong_count(&alive) == 2);
        drop(y);
        assert_eq!(Arc::strong_count(&alive), 1);
        let plain = [tch::no_grad(|| make(&x)), make(&x.detach())];
        assert!(plain.iter().all(|y| !y.requires_grad()));
        assert_eq!(Arc::strong_count(&alive), 1, "no gradient is asked for");
    }

    #[test]
    fn errors_and_panics_end_the_pass_with_their_message() {
        let x = leaf(&[1.0]);
        let fail = |backward: fn(&Tensor) -> Result<Gradients>| {
            let y = custom(&x.detach(), &[&x], backward).unwrap();
            y.sum(tch::Kind::Float).f_backward().unwrap_err().to_string()
        };
        assert!(fail(|_| bail!("no memory left")).contains("no memory left"));
        assert!(fail(|_| panic!("a mistake")).contains("a mistake"));
        assert!(fail(|_| Ok(vec![])).contains("0 gradients for 1 inputs"));
        assert!(!x.grad().defined());
        // And within another step.
        let outer = custom(&x.detach(), &[&x], |upstream| {
            let x = upstream.detach().set_requires_grad(true);
            let inner = tch::with_grad(|| custom(&x.detach(), &[&x], |_| bail!("deep inside")))?;
            of(&inner, upstream, &[&x])
        });
        let told = outer.unwrap().sum(tch::Kind::Float).f_backward().unwrap_err().to_string();
        assert!(told.contains("deep inside"), "{told}");
    }

    #[test]
    fn gradients_of_what_is_used_only() {
        let (a, b) = (leaf(&[3.0]), leaf(&[4.0]));
        let found = of(&(&a * &a), &Tensor::from_slice(&[2f32]), &[&a, &b]).unwrap();
        assert_eq!(found[0].as_ref().unwrap().double_value(&[0]), 12.0);
        assert!(found[1].is_none() && !a.grad().defined());
        assert!(of(&Tensor::from_slice(&[1f32]), &Tensor::from_slice(&[1f32]), &[&a]).unwrap()[0].is_none());
    }
}
