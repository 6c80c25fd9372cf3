#!/bin/sh
# Compiles the Core ML packages beside this script. On a Mac with Xcode:
#
#   sh compile.sh                  into Resources/, which Apple's Swift package (StableDiffusionSample) reads
#   sh compile.sh --mochi          and copies that to Mochi Diffusion's models
#   sh compile.sh --diffusers-app  and packs it as the Diffusers app wants it
set -eu
cd -- "$(dirname -- "$0")"
name='@NAME@'
variant='@VARIANT@'

case "${1-}" in
'' | --mochi | --diffusers-app) ;;
*)
    sed -n '2,6s/^# \{0,1\}//p' compile.sh
    [ "$1" = --help ] || { echo "$1 is none of these" >&2 && exit 2; }
    exit 0
    ;;
esac

packages() { # what to do with each
    :
@COMPILE@
}

is_here() {
    [ -d "$1" ] && return
    echo "$1 is not here any more: export again, with --bundle-resources-for-swift-cli --overwrite" >&2
    exit 1
}

packages is_here

if ! xcrun --find coremlcompiler > /dev/null 2>&1; then
    echo "coremlcompiler is not here: it comes with Xcode, on a Mac" >&2
    exit 1
fi

# Made aside, so that what is there stays there if something fails.
aside=.compiling
trap 'rm -rf -- "$aside"' EXIT

compile() { # package, its name in Resources/
    rm -rf -- "$aside"
    mkdir -- "$aside"
    xcrun coremlcompiler compile "$1" "$aside"
    rm -rf -- "Resources/$2.mlmodelc"
    mv -- "$aside/$(basename "$1" .mlpackage).mlmodelc" "Resources/$2.mlmodelc"
    echo "Resources/$2.mlmodelc"
}

packages compile

case "${1-}" in
--mochi)
    models="$HOME/MochiDiffusion/models/$name"
    mkdir -p -- "$models"
    for compiled in Resources/*.mlmodelc; do
        rm -rf -- "$models/$(basename "$compiled")"
    done
    for network in Unet ControlledUnet; do
        if [ -e "Resources/$network.mlmodelc" ] || [ -e "Resources/${network}Chunk1.mlmodelc" ]; then
            rm -rf -- "$models/$network.mlmodelc" "$models/${network}Chunk1.mlmodelc" "$models/${network}Chunk2.mlmodelc"
        fi
    done
    cp -R Resources/. "$models"
    echo "$models"
    ;;
--diffusers-app)
    packed="${name}_${variant}"
    rm -rf -- "$aside"
    mkdir -- "$aside"
    cp -R Resources "$aside/$packed"
    (cd -- "$aside" && zip -qr "$packed.zip" "$packed")
    mv -f -- "$aside/$packed.zip" .
    echo "$packed.zip"
    ;;
esac
