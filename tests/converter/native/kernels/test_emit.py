"""Templates: what is filled in, how it is indented, which lines stay."""

from __future__ import annotations

import pytest

from gkp.converter.native.dtypes import DType
from gkp.converter.native.kernels.emit import fill, unit
from gkp.converter.native.kernels.layout import planar
from gkp.converter.native.program import Value

INT8 = DType("int8", "signed char", 1)


def test_several_lines_are_indented_like_the_line_in_which_they_stand() -> None:
    text = fill("""
        for (;;) {
          @body@
        }
    """, body="if (a) {\n  b;\n}\n")
    assert text == "for (;;) {\n  if (a) {\n    b;\n  }\n}\n"


@pytest.mark.parametrize("statements", [["a;", "b;"], iter(["a;", "b;"]), map(str, ("a;", "b;"))])
def test_statements_may_come_one_by_one(statements: object) -> None:
    assert fill("{\n  @all@\n}", all=statements) == "{\n  a;\n  b;\n}\n"


def test_fields_and_places_of_values() -> None:
    assert fill("x + @at.row@ * @pair[1]@", at=planar(Value(2, 3, 4)), pair=(5, 6)) == "x + 4 * 6\n"


def test_an_empty_value_takes_its_line_along_but_blank_lines_stay() -> None:
    assert fill("a;\n\n@nothing@\n  @nothing@\nb@nothing@;", nothing="") == "a;\n\nb;\n"


@pytest.mark.parametrize(("there", "text"), [(True, "a;\n  b;\n"), (0, "a;\n")])
def test_lines_that_are_there_only_sometimes(there: object, text: str) -> None:
    assert fill("a;\n  $if there: b;", there=there) == text


@pytest.mark.parametrize("template", ["@missing@", "$if missing: a;", "@there.missing@"])
def test_a_name_without_a_value_is_an_error(template: str) -> None:
    with pytest.raises((KeyError, AttributeError)):
        fill(template, there=1)


def test_values_are_not_templates() -> None:
    assert fill("@a@", a="@b@ $if c: d") == "@b@ $if c: d\n"


def test_the_pointers_of_a_kernel_have_the_types_of_its_operands() -> None:
    text = unit("body;\n", x=INT8)
    assert text.startswith('#include "gkp.h"\n\nextern "C" void KERNEL(')
    assert "const signed char* x = static_cast<const signed char*>(source);" in text
    assert "const float* r = static_cast<const float*>(second);" in text
    assert "  float* y = static_cast<float*>(target);\n  body;\n}\n" in text
