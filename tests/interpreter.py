"""Changes to Triton's interpreter, which runs kernels on the CPU: one for time, one for what it gets wrong."""

import os


def prepare_interpreter() -> None:
    """Change the interpreter where the kernels run by it. Call this before a kernel runs."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    if hasattr(interpreter, "_patch_lang"):
        interpreter._patch_lang = _once_per_kernel(interpreter._patch_lang)
    _spread_conditions(interpreter)


def _once_per_kernel(patch):
    """Spare a third of the time.

    Before each kernel, and again in each function that a kernel calls, the interpreter looks through all of Triton's
    language for what it must replace. Inside a kernel, the second look from a module finds nothing new.
    """
    scopes: list = []  # of the kernel that runs
    seen: set[int] = set()  # the modules from which it has looked

    def patch_once(function):
        module = id(function.__globals__)
        if scopes and module in seen:
            return scopes[0]
        scope = patch(function)
        seen.add(module)
        if not scopes and hasattr(scope, "restore"):
            restore = scope.restore

            def end():
                scopes.clear()
                seen.clear()
                restore()

            scope.restore = end
            scopes.append(scope)
        return scope

    return patch_once


def _spread_conditions(interpreter) -> None:
    """Keep a comparison of two numbers a condition where it meets a block.

    The interpreter makes int32 of it, which triton 3.9 refuses in the mask of a load or store. Compiled kernels are
    right.
    """
    spread = interpreter.InterpreterBuilder.create_splat

    def create_splat(self, block, value):
        if value.data.dtype == bool:
            value = interpreter.TensorHandle(value.data, interpreter.tl.int1)
        return spread(self, block, value)

    interpreter.InterpreterBuilder.create_splat = create_splat
