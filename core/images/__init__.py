"""Images from disk as a network takes them: CIFAR-10, folders of classes, arrays. numpy only, and pillow for folders."""
