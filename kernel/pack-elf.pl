#!/usr/bin/perl
# SPDX-License-Identifier: Apache-2.0
#
# pack-elf.pl IN OUT: write a bootable kernel ELF without its symbols, its
# sections and the padding between its parts.
#
# The kernel aligns its parts to 2 MiB, so that they can be mapped with large
# pages, and the linker stores that padding in the file: a third of it. A loader
# needs none of it, only the addresses. strip(1) has to keep it.
use strict;
use warnings;

use constant {
    PAGE    => 4096,
    PT_LOAD => 1,
    PT_NOTE => 4,
    # A shorter gap is not worth a segment of its own.
    MIN_GAP => 2 * 4096,
};
my $EHDR = 'a16 S< S< L< Q< Q< Q< L< S< S< S< S< S< S<';
my $PHDR = 'L< L< Q< Q< Q< Q< Q< Q<';

die "usage: pack-elf.pl IN OUT\n" unless @ARGV == 2;
my ($in, $out) = @ARGV;
my $elf = slurp($in);
die "$in: not a 64-bit little-endian ELF file\n" unless $elf =~ /^\x7fELF\x02\x01/;

my ($ident, $type, $machine, $version, $entry, $phoff, undef, $flags,
    $ehsize, $phentsize, $phnum) = unpack $EHDR, $elf;
my @pieces = map {
    my %ph;
    @ph{qw(type flags offset vaddr paddr filesz memsz align)} =
        unpack $PHDR, substr($elf, $phoff + $_ * $phentsize, $phentsize);
    $ph{type} == PT_LOAD ? split_load(\%ph) : $ph{type} == PT_NOTE ? note(\%ph) : ();
} 0 .. $phnum - 1;

my $offset = align($ehsize + @pieces * $phentsize);
my ($headers, $body) = ('', '');
for my $p (@pieces) {
    $headers .= pack $PHDR, $p->{type}, $p->{flags}, $offset + length $body, $p->{vaddr},
        $p->{paddr}, length $p->{bytes}, $p->{memsz}, $p->{type} == PT_LOAD ? PAGE : 4;
    $body .= $p->{bytes} . "\0" x (align(length $p->{bytes}) - length $p->{bytes});
}
my $ehdr = pack $EHDR, $ident, $type, $machine, $version, $entry, $ehsize, 0, $flags,
    $ehsize, $phentsize, scalar @pieces, 0, 0, 0;
my $head = $ehdr . $headers;
open my $fh, '>:raw', $out or die "$out: $!\n";
print {$fh} $head, "\0" x ($offset - length $head), $body or die "$out: $!\n";
close $fh or die "$out: $!\n";

# The parts of a segment between its long gaps. A part claims the zeros that
# follow it, in the file or not: its loader clears them. Nothing stands before the
# first part to claim its zeros, so it keeps them. Breakpoints (the filler of code)
# are never reached and need not be there at all.
sub split_load {
    my ($ph) = @_;
    my $bytes = substr $elf, $ph->{offset}, $ph->{filesz};
    my (@parts, $gap);
    for (my $at = 0; $at < length $bytes; $at += PAGE) {
        my $page = substr $bytes, $at, PAGE;
        my $filler = $page !~ /[^\0]/ ? 'zero' : $page !~ /[^\xcc]/ ? 'int3' : '';
        if ($filler && @parts) {
            $gap //= { at => $at };
            $gap->{int3} ||= $filler eq 'int3';
            next;
        }
        if (@parts && (!$gap || $at - $gap->{at} < MIN_GAP)) {
            $parts[-1]{end} = $at + length $page;
        } else {
            $parts[-1]{claim} = $gap->{int3} ? $parts[-1]{end} : $at if @parts;
            push @parts, { start => $at, end => $at + length $page };
        }
        undef $gap;
    }
    return () unless @parts;
    $parts[-1]{claim} = $ph->{memsz};
    return map { {
        type  => PT_LOAD,
        flags => $ph->{flags},
        vaddr => $ph->{vaddr} + $_->{start},
        paddr => $ph->{paddr} + $_->{start},
        memsz => $_->{claim} - $_->{start},
        bytes => substr($bytes, $_->{start}, $_->{end} - $_->{start}),
    } } @parts;
}

# The PVH entry point is told in a note.
sub note {
    my ($ph) = @_;
    return { %$ph, bytes => substr $elf, $ph->{offset}, $ph->{filesz} };
}

sub align { return ($_[0] + PAGE - 1) & ~(PAGE - 1) }

sub slurp {
    my ($path) = @_;
    open my $file, '<:raw', $path or die "$path: $!\n";
    local $/;
    return <$file> // die "$path: $!\n";
}
