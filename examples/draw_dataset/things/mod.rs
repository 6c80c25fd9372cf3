//! The things: each a function that draws one, its main part in a given colour.

mod animals;
mod buildings;
mod objects;
mod plants;

use crate::pen::{Pen, Rgb};

/// One nameable thing.
pub struct Thing {
    pub name: &'static str,
    pub draw: fn(&mut Pen, Rgb),
    /// Whether it stands on the ground and throws a shadow there.
    pub stands: bool,
}

const fn standing(name: &'static str, draw: fn(&mut Pen, Rgb)) -> Thing {
    Thing { name, draw, stands: true }
}

const fn floating(name: &'static str, draw: fn(&mut Pen, Rgb)) -> Thing {
    Thing { name, draw, stands: false }
}

pub const THINGS: &[Thing] = &[
    standing("apple", plants::apple),
    standing("banana", plants::banana),
    standing("pear", plants::pear),
    standing("cherry", plants::cherry),
    standing("mushroom", plants::mushroom),
    standing("tree", plants::tree),
    standing("pine", plants::pine),
    standing("cactus", plants::cactus),
    standing("flower", plants::flower),
    standing("tulip", plants::tulip),
    floating("sun", objects::sun),
    floating("moon", objects::moon),
    floating("star", objects::bright_star),
    floating("cloud", objects::cloud),
    standing("house", buildings::house),
    standing("castle", buildings::castle),
    standing("tent", buildings::tent),
    standing("lighthouse", buildings::lighthouse),
    standing("boat", buildings::boat),
    standing("car", buildings::car),
    standing("bus", buildings::bus),
    floating("rocket", buildings::rocket),
    floating("balloon", objects::balloon),
    floating("umbrella", objects::umbrella),
    standing("cup", objects::cup),
    standing("teapot", objects::teapot),
    standing("bottle", objects::bottle),
    standing("lamp", objects::lamp),
    standing("clock", objects::clock),
    standing("book", objects::book),
    standing("key", objects::key),
    standing("guitar", objects::guitar),
    floating("fish", animals::fish),
    standing("bird", animals::bird),
    standing("duck", animals::duck),
    standing("cat", animals::cat),
    standing("dog", animals::dog),
    standing("rabbit", animals::rabbit),
    standing("snail", animals::snail),
    floating("butterfly", animals::butterfly),
    standing("ladybug", animals::ladybug),
    standing("snowman", animals::snowman),
    standing("crown", objects::crown),
    floating("heart", objects::heart),
];
