//! The change of one layer: which tensors make it, and whether they fit the layer. No value is read here.

use super::file::{LoraFile, Parts};
use super::keys::Part;

/// How the tensors of a layer, by their names in the file, make the change of its weight.
#[derive(Clone, Debug, PartialEq)]
pub enum Form {
    /// LoRA (Hu et al. 2021, arXiv:2106.09685) and LoCon: `up · down`, with LoCon's `mid` between (a Tucker decomposition).
    Product { up: String, mid: Option<String>, down: String },
    /// LoRA of an embedding of tokens: `(up · down)ᵀ`.
    Embedding { up: String, down: String },
    /// LoHa (Hyeon-Woo et al. 2021, arXiv:2108.06098): the elements of two products, multiplied.
    Hadamard([Factors; 2]),
    /// LoKr (Yeh et al. 2023, arXiv:2309.14859): the Kronecker product of two matrices.
    Kronecker([Side; 2]),
    /// The change itself.
    Difference(String),
}

/// Two factors and, between them, what a Tucker decomposition has.
#[derive(Clone, Debug, PartialEq)]
pub struct Factors {
    pub a: String,
    pub b: String,
    pub tucker: Option<String>,
}

/// A side of a Kronecker product.
#[derive(Clone, Debug, PartialEq)]
pub enum Side {
    Whole(String),
    Factors(Factors),
}

/// What is wrong with the tensors of a layer: without the file's name, with the tensor's.
pub type Misfit = String;

impl Form {
    /// That of a layer's parts; `None` where they change no weight.
    ///
    /// # Errors
    /// A part is missing (named by what is there), or parts of two kinds are there.
    pub fn of(parts: &Parts) -> Result<Option<Self>, Misfit> {
        use Part::*;
        let taken = |part: Part| parts.get(&part).cloned();
        let has = |wanted: &[Part]| wanted.iter().any(|part| parts.contains_key(part));
        let pair = |a: Part, b: Part, what: &str| match (taken(a), taken(b)) {
            (Some(a), Some(b)) => Ok((a, b)),
            (Some(alone), None) | (None, Some(alone)) => {
                Err(format!("`{alone}` stands alone: {what}, which it is multiplied with, is missing"))
            }
            (None, None) => Err(format!("`{}` stands alone: {what} are missing", first(parts))),
        };
        let mut forms = Vec::new();
        if has(&[Up, Down, Mid]) {
            let (up, down) = pair(Up, Down, "the other factor (up or down)")?;
            forms.push(Self::Product { up, mid: taken(Mid), down });
        }
        if has(&[EmbeddingUp, EmbeddingDown]) {
            let (up, down) = pair(EmbeddingUp, EmbeddingDown, "the other factor (A or B)")?;
            forms.push(Self::Embedding { up, down });
        }
        if has(&[Hada1A, Hada1B, Hada1T, Hada2A, Hada2B, Hada2T]) {
            let what = "the other factor of LoHa";
            let ((a, b), (c, d)) = (pair(Hada1A, Hada1B, what)?, pair(Hada2A, Hada2B, what)?);
            if let (Some(alone), None) | (None, Some(alone)) = (taken(Hada1T), taken(Hada2T)) {
                return Err(format!("`{alone}` stands alone: LoHa has hada_t1 and hada_t2, or neither"));
            }
            forms.push(Self::Hadamard([
                Factors { a, b, tucker: taken(Hada1T) },
                Factors { a: c, b: d, tucker: taken(Hada2T) },
            ]));
        }
        if has(&[Kron1, Kron1A, Kron1B, Kron2, Kron2A, Kron2B, Kron2T]) {
            let side = |whole: Part, a: Part, b: Part, tucker: Option<String>, name: &str| match taken(whole) {
                Some(_) if has(&[a, b]) => Err(format!("{name} of LoKr is there whole and in factors")),
                Some(_) if tucker.is_some() => Err("lokr_t2 is there, and lokr_w2 whole".to_owned()),
                Some(whole) => Ok(Side::Whole(whole)),
                None => {
                    let (a, b) = pair(a, b, &format!("{name} of LoKr"))?;
                    Ok(Side::Factors(Factors { a, b, tucker }))
                }
            };
            let first = side(Kron1, Kron1A, Kron1B, None, "lokr_w1")?;
            forms.push(Self::Kronecker([first, side(Kron2, Kron2A, Kron2B, taken(Kron2T), "lokr_w2")?]));
        }
        forms.extend(taken(Difference).map(Self::Difference));
        if forms.len() > 1 {
            return Err(format!("`{}`: its layer has changes of two kinds", first(parts)));
        }
        let form = forms.pop();
        if let (None, Some(alone)) = (&form, [DoraScale, Magnitude, Alpha, Scalar, UpBias].into_iter().find_map(taken))
        {
            return Err(format!("`{alone}` stands alone: the factors that it goes with are missing"));
        }
        Ok(form)
    }

    /// What `inspect` and `check` call it.
    pub fn title(&self, file: &LoraFile) -> &'static str {
        match self {
            Self::Product { mid: Some(_), .. } => "LoCon (Tucker)",
            // A convolution that sees neighbours.
            Self::Product { down, .. } if file.shape(down).iter().skip(2).any(|&n| n > 1) => "LoCon",
            Self::Product { .. } => "LoRA",
            Self::Embedding { .. } => "LoRA of token embeddings",
            Self::Hadamard(_) => "LoHa",
            Self::Kronecker(_) => "LoKr",
            Self::Difference(_) => "full differences",
        }
    }

    /// The rank, where α is divided by one.
    pub fn rank(&self, file: &LoraFile) -> Option<i64> {
        let rows = |name: &String| file.shape(name).first().copied();
        match self {
            Self::Product { down, .. } | Self::Embedding { down, .. } => rows(down),
            Self::Hadamard([first, _]) => rows(&first.b),
            Self::Kronecker(sides) => sides.iter().find_map(|side| match side {
                Side::Factors(factors) => rows(&factors.b),
                Side::Whole(_) => None,
            }),
            Self::Difference(_) => None,
        }
    }

    /// Every tensor that makes it, in the order in which the formula has them.
    pub fn tensors(&self) -> Vec<&str> {
        fn factors(f: &Factors) -> impl Iterator<Item = &str> {
            [Some(&f.a), f.tucker.as_ref(), Some(&f.b)].into_iter().flatten().map(String::as_str)
        }
        match self {
            Self::Product { up, mid, down } => {
                [Some(up), mid.as_ref(), Some(down)].into_iter().flatten().map(String::as_str).collect()
            }
            Self::Embedding { up, down } => vec![up, down],
            Self::Hadamard(both) => both.iter().flat_map(factors).collect(),
            Self::Kronecker(sides) => sides
                .iter()
                .flat_map(|side| match side {
                    Side::Whole(name) => vec![name.as_str()],
                    Side::Factors(f) => factors(f).collect(),
                })
                .collect(),
            Self::Difference(name) => vec![name],
        }
    }

    /// How many inputs the layer has of which it is, as far as its tensors tell.
    pub fn inputs(&self, file: &LoraFile) -> Option<i64> {
        let axis = |name: &String, axis: usize| file.shape(name).get(axis).copied();
        match self {
            Self::Product { down, .. } => axis(down, 1),
            Self::Hadamard([first, _]) => axis(&first.b, 1),
            Self::Kronecker([first, second]) => {
                let (outer, inner) = (first.matrix(file).ok()?, second.matrix(file).ok()?);
                outer.columns.checked_mul(inner.columns)
            }
            Self::Difference(name) => axis(name, 1),
            Self::Embedding { .. } => None,
        }
    }

    /// Checks that the tensors make a change of a weight of this shape.
    ///
    /// # Errors
    /// The first that does not, with its shape and what is expected.
    pub fn fits(&self, file: &LoraFile, weight: &[i64]) -> Result<(), Misfit> {
        let matrix = Matrix::of(weight);
        match self {
            Self::Product { up, mid: None, down } => {
                let (of_up, of_down) = (Matrix::of(&file.shape(up)), Matrix::of(&file.shape(down)));
                of_up.multiplies(&of_down, file, up, down)?;
                // That next to the input has the layer's own, flat or not.
                let shape = file.shape(down);
                let of_inputs = shape.len() <= 2 || trimmed(&shape[1..]) == trimmed(&weight[1..]);
                expect(of_up.rows == matrix.rows, file, up, weight)?;
                expect(of_down.columns == matrix.columns && of_inputs, file, down, weight)
            }
            Self::Product { up, mid: Some(mid), down } => {
                tucker(file, [up, mid, down], weight, |shape| (shape[0], shape.get(1).copied().unwrap_or(1)))
            }
            Self::Embedding { up, down } => {
                let (of_up, of_down) = (Matrix::of(&file.shape(up)), Matrix::of(&file.shape(down)));
                of_up.multiplies(&of_down, file, up, down)?;
                expect(of_up.rows == matrix.columns, file, up, weight)?;
                expect(of_down.columns == matrix.rows, file, down, weight)
            }
            Self::Hadamard(both) => both.iter().try_for_each(|factors| factors.fits(file, weight)),
            Self::Kronecker([first, second]) => {
                let (outer, inner) = (first.matrix(file)?, second.matrix(file)?);
                let rows = outer.rows.checked_mul(inner.rows);
                let columns = outer.columns.checked_mul(inner.columns);
                let fits = rows == Some(matrix.rows) && columns == Some(matrix.columns);
                expect(fits, file, second.name(), weight)
            }
            Self::Difference(name) => {
                let shape = file.shape(name);
                expect(trimmed(&shape) == trimmed(weight), file, name, weight)
            }
        }
    }
}

impl Factors {
    /// Without a Tucker decomposition `a · b`; with one the factors are the other way round, `a` is `[rank, out]`.
    fn fits(&self, file: &LoraFile, weight: &[i64]) -> Result<(), Misfit> {
        if let Some(middle) = &self.tucker {
            return tucker(file, [&self.a, middle, &self.b], weight, |shape| {
                (shape.get(1).copied().unwrap_or(1), shape[0])
            });
        }
        let (a, b) = (Matrix::of(&file.shape(&self.a)), Matrix::of(&file.shape(&self.b)));
        a.multiplies(&b, file, &self.a, &self.b)?;
        expect(a.rows == Matrix::of(weight).rows, file, &self.a, weight)?;
        expect(b.columns == Matrix::of(weight).columns, file, &self.b, weight)
    }
}

impl Side {
    fn name(&self) -> &str {
        match self {
            Side::Whole(name) => name,
            Side::Factors(factors) => &factors.a,
        }
    }

    /// The matrix that it makes.
    fn matrix(&self, file: &LoraFile) -> Result<Matrix, Misfit> {
        match self {
            Side::Whole(name) => Ok(Matrix::of(&file.shape(name))),
            Side::Factors(Factors { a, b, tucker: None }) => {
                let (of_a, of_b) = (Matrix::of(&file.shape(a)), Matrix::of(&file.shape(b)));
                of_a.multiplies(&of_b, file, a, b)?;
                Ok(Matrix { rows: of_a.rows, columns: of_b.columns })
            }
            Side::Factors(Factors { a, b, tucker: Some(middle) }) => {
                let (of_a, of_b, kernel) = (file.shape(a), file.shape(b), file.shape(middle));
                let fits = of_a.len() == 2 && of_b.len() == 2 && kernel.len() > 2;
                let fits = fits && kernel[0] == of_a[0] && kernel[1] == of_b[0] && of_a[0] > 0 && of_b[0] > 0;
                if !fits {
                    return Err(format!("`{middle}` has the shape {kernel:?}, and its factors {of_a:?} and {of_b:?}"));
                }
                Ok(Matrix { rows: of_a[1], columns: of_b[1].saturating_mul(elements(&kernel[2..])) })
            }
        }
    }
}

/// A weight as a matrix: the first axis by all others.
struct Matrix {
    rows: i64,
    columns: i64,
}

impl Matrix {
    fn of(shape: &[i64]) -> Self {
        Self { rows: shape.first().copied().unwrap_or(1), columns: elements(shape.get(1..).unwrap_or_default()) }
    }

    /// Whether the product with `right` exists, as the two tensors `names`.
    fn multiplies(&self, right: &Self, file: &LoraFile, left_name: &str, right_name: &str) -> Result<(), Misfit> {
        let (left_shape, right_shape) = (file.shape(left_name), file.shape(right_name));
        // The factor next to the output has no kernel.
        if self.columns == right.rows && self.columns > 0 && trimmed(&left_shape).len() <= 2 {
            return Ok(());
        }
        Err(format!(
            "`{left_name}` of the shape {left_shape:?} and `{right_name}` of {right_shape:?} cannot be multiplied"
        ))
    }
}

/// Checks a Tucker decomposition `[left, middle, right]` of a weight; `sides` tells the output's and the rank's axis of a
/// factor on the left, the rank's and the input's of one on the right.
fn tucker(
    file: &LoraFile,
    [left, middle, right]: [&String; 3],
    weight: &[i64],
    sides: impl Fn(&[i64]) -> (i64, i64),
) -> Result<(), Misfit> {
    let shapes = [left, middle, right].map(|name| file.shape(name));
    if let Some(place) = shapes.iter().position(|shape| shape.len() < 2 || shape.len() > 4) {
        return expect(false, file, [left, middle, right][place], weight);
    }
    let ((out, from), kernel) = (sides(&shapes[0]), &shapes[1]);
    // On the right the rank comes first in both ways of writing.
    let (to, into) = (shapes[2][0], shapes[2][1]);
    if kernel[0] != from || kernel[1] != to || from == 0 || to == 0 {
        return Err(format!(
            "`{middle}` has the shape {kernel:?}, and its factors {:?} and {:?}",
            shapes[0], shapes[2]
        ));
    }
    expect(weight.first() == Some(&out), file, left, weight)?;
    expect(weight.get(1) == Some(&into), file, right, weight)?;
    expect(weight.len() == kernel.len() && weight[2..] == kernel[2..], file, middle, weight)
}

fn expect(fits: bool, file: &LoraFile, name: &str, weight: &[i64]) -> Result<(), Misfit> {
    if fits {
        return Ok(());
    }
    Err(format!("`{name}` of the shape {:?} does not go with a weight of {weight:?}", file.shape(name)))
}

/// The product of axes, which a file may make of any size where one of them is 0.
fn elements(shape: &[i64]) -> i64 {
    shape.iter().fold(1, |product: i64, &n| product.saturating_mul(n))
}

/// A shape without axes of length 1 at its end.
pub fn trimmed(shape: &[i64]) -> &[i64] {
    let end = shape.iter().rposition(|&n| n != 1).map_or(0, |last| last + 1);
    &shape[..end]
}

fn first(parts: &Parts) -> &str {
    parts.values().next().map_or("", String::as_str)
}
