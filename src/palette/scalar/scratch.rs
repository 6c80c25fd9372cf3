//! Tables by code are 256 KiB and more: they are kept for the next layer, since fresh memory costs more than what is
//! done with it on a small one.

use std::any::Any;
use std::cell::RefCell;

use super::code::{ByCode, CODES};

type Tables = RefCell<Vec<Box<dyn Any>>>;

thread_local! {
    /// Of zeros: whoever puts a table back here has cleared what it wrote, which is less than the whole.
    static ZEROS: Tables = const { RefCell::new(Vec::new()) };
    static OTHERS: Tables = const { RefCell::new(Vec::new()) };
}

/// As many as a thread keeps of each: of a large layer each piece has its own.
const MOST: usize = 20;

fn take<T: Copy + Default + 'static>(tables: &'static std::thread::LocalKey<Tables>) -> Box<ByCode<T>> {
    let kept = tables.with_borrow_mut(|kept| {
        let place = kept.iter().position(|table| table.is::<ByCode<T>>())?;
        kept.swap_remove(place).downcast().ok()
    });
    kept.unwrap_or_else(|| vec![T::default(); CODES].try_into().ok().expect("as long as the array"))
}

fn keep<T: 'static>(tables: &'static std::thread::LocalKey<Tables>, table: Box<ByCode<T>>) {
    tables.with_borrow_mut(|kept| {
        if kept.len() < MOST {
            kept.push(table);
        }
    });
}

/// A table of zeros.
pub fn zeros<T: Copy + Default + 'static>() -> Box<ByCode<T>> {
    take(&ZEROS)
}

/// For [`zeros`] to give out again.
pub fn put_back_zeros<T: 'static>(table: Box<ByCode<T>>) {
    keep(&ZEROS, table);
}

/// A table with these values at the codes `bins`, and anything elsewhere.
pub fn filled<T: Copy + Default + 'static>(bins: &[u16], values: impl Iterator<Item = T>) -> Box<ByCode<T>> {
    let mut table = take(&OTHERS);
    for (&bin, value) in bins.iter().zip(values) {
        table[bin as usize] = value;
    }
    table
}

/// For [`filled`] to write over.
pub fn put_back<T: 'static>(table: Box<ByCode<T>>) {
    keep(&OTHERS, table);
}
